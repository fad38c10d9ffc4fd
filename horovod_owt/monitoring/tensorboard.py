"""TensorBoard files of a run, written by a separate thread."""

from __future__ import annotations

import logging
import os
import queue
import re
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import summary

from horovod_owt.data.batch import MEAN, STD
from horovod_owt.text import valid

log = logging.getLogger(__name__)

IMAGES = 8  # shown from a batch
MAX_CURVES = 20  # up to so many classes have a curve each; of more, the worst are listed
CLOSE_S = 10.0  # to write the rest at the end: the disk may hang
MEANS = {  # tag -> key of step records, whose mean is shown
    "train/loss": "loss",
    "speed/images_per_s": "images_per_s",
    "speed/step_ms": "step_ms",
    "speed/data_wait_ms": "data_wait_ms",
    "speed/exposed_comm_ms": "exposed_comm_ms",
}
LAST = {"train/lr": "lr", "train/epoch": "epoch", "train/gradient_norm": "grad_norm"}
SCORES = ("loss", "top1", "top5", "averaged_loss", "averaged_top1", "averaged_top5")  # of a validation
END = None  # the last item of the queue


class EventFile:
    """A new file in TensorBoard's folder; it hides events of earlier files from `first_step` on."""

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{_time_for_name(folder):017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("xb")
        self._records = RecordWriter(self._file)
        self._add(step=first_step, file_version="brain.Event:2")
        self._add(step=first_step, session_log=SessionLog(status=SessionLog.START))
        self.flush()

    def add(self, step: int, value: Summary) -> None:
        self._add(step=step, summary=value)

    def flush(self) -> None:
        self._records.flush()

    def close(self) -> None:
        self._file.close()

    def _add(self, **values: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **values).SerializeToString())


def _time_for_name(folder: Path) -> float:
    """The time in seconds, but later than in the names that are there, whatever this host's clock says.

    TensorBoard reads files in the order of their names, and never goes back to an earlier one.
    """
    found = (re.match(r"events\.out\.tfevents\.(\d+\.\d+)\.", name) for name in os.listdir(folder))
    return max([time.time(), *(float(each[1]) + 1e-3 for each in found if each)])


class TensorBoard:
    """Writes the records of a run, images and per-class accuracy to `folder`.

    Callers only queue them. An error ends the writing, with a warning, but never the run.
    """

    def __init__(self, folder: Path, *, first_step: int, every: int) -> None:
        """`first_step` is the next step; step records are shown as means over `every` steps."""
        self._folder, self._first_step, self._every = folder, first_step, every
        self._steps: list[Mapping[str, Any]] = []
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="tensorboard", daemon=True)
        self._thread.start()

    def record(self, kind: str, values: Mapping[str, Any]) -> None:
        """Show what is written to the run's records."""
        if kind == "step":
            self._steps.append(values)
            if values["step"] % self._every == 0:
                self._queue.put((self._write_steps, self._steps))
                self._steps = []
        elif kind == "validation":
            self._queue.put((self._write_validation, values))

    def images(self, step: int, batch: Tensor) -> None:
        """Show the first images of a batch, as the net gets them."""
        self._queue.put((self._write_images, step, batch[:IMAGES].to("cpu", torch.float32, copy=True)))

    def per_class(self, step: int, accuracy: Sequence[float], names: Sequence[str]) -> None:
        """Show the accuracy of each class in percent; NaN for a class without images."""
        self._queue.put((self._write_per_class, step, accuracy, [valid(name) for name in names]))

    def close(self) -> None:
        """Write what is queued; on a disk that hangs, give up."""
        if self._steps:
            self._queue.put((self._write_steps, self._steps))
        self._queue.put(END)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            log.warning("%s: not all written: the disk does not answer", self._folder)

    def _run(self) -> None:
        try:
            self._file = EventFile(self._folder, self._first_step)
            try:
                self._write_queue()
            finally:
                self._file.close()
        except Exception as error:  # a bug too must not end the run, nor fill memory with what waits here
            why = isinstance(error, OSError) and error.strerror or f"{type(error).__name__}: {error}"
            log.warning("%s: %s; TensorBoard gets no more of this run", self._folder, why)
            while self._queue.get() is not END:  # and forget it
                pass

    def _write_queue(self) -> None:
        while (item := self._queue.get()) is not END:
            write, *values = item
            write(*values)
            if self._queue.empty():  # so that a kill loses nothing that a checkpoint has
                self._file.flush()

    def _write_steps(self, steps: Sequence[Mapping[str, Any]]) -> None:
        step = steps[-1]["step"]
        for tag, key in MEANS.items():
            self._scalar(tag, fmean(each[key] for each in steps), step)
        for tag, key in LAST.items():
            if found := [each[key] for each in steps if key in each]:
                self._scalar(tag, found[-1], step)

    def _write_validation(self, values: Mapping[str, Any]) -> None:
        for key in SCORES:
            if key in values:
                self._scalar(f"validation/{key}", values[key], values["step"])

    def _write_images(self, step: int, batch: Tensor) -> None:
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        for number, image in enumerate((batch * std + mean).clamp(0, 1)):
            picture = summary.image(f"augmented/{number}", image, dataformats="CHW")
            self._file.add(step, picture)

    def _write_per_class(self, step: int, accuracy: Sequence[float], names: Sequence[str]) -> None:
        known = sorted((value, name) for value, name in zip(accuracy, names, strict=True) if value == value)
        if not known:
            return
        values = torch.tensor([value for value, _ in known]).numpy()
        self._file.add(step, summary.histogram("validation/top1_of_classes", values, bins="auto"))
        if len(known) <= MAX_CURVES:
            for value, name in known:
                self._scalar(f"class_top1/{name}", value, step)
        rows = "".join(f"| {name} | {value:.1f} |\n" for value, name in known[:MAX_CURVES])
        worst = f"| class | top-1 in percent |\n|---|---|\n{rows}"
        self._file.add(step, summary.text("validation/worst_classes", worst))

    def _scalar(self, tag: str, value: float, step: int) -> None:
        self._file.add(step, summary.scalar(tag, value))
