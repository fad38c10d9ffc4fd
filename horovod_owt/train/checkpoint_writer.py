"""Write checkpoints in a background thread, and tolerate a limited number of failures."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from horovod_owt.errors import RunError
from horovod_owt.runs.checkpoints import checkpoint_folder, drop_old, record_score, step_of
from horovod_owt.train.checkpoint import Checkpoint, DiskError, write_checkpoint

log = logging.getLogger(__name__)

RETRY_S = 5.0  # between attempts at the end of a run, when there is no next checkpoint


@dataclass(frozen=True)
class Written:
    """A checkpoint on disk."""

    folder: Path
    seconds: float
    left_over: list[str]  # messages about old checkpoints that could not be deleted


class CheckpointWriter:
    """Writes one checkpoint at a time; `retries` failures in a row are tolerated.

    `record` gets a line of kind `checkpoint` or `fault` for each write.
    """

    def __init__(self, run_dir: Path, *, keep: int, retries: int, record: Callable[..., None]) -> None:
        self._run_dir, self._keep, self._retries, self._record = run_dir, keep, retries, record
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Written] | None = None
        self._last: Checkpoint | None = None  # until it is on disk
        self._stall_s = 0.0
        self._failures = 0  # in a row
        self._left_over: set[str] = set()  # messages already logged
        self._score: dict[str, float] = {}  # of a checkpoint that may not be on disk yet
        self._fatal: RunError | None = None

    def write(self, checkpoint: Checkpoint, *, stall_s: float = 0.0) -> None:
        """Start to write `checkpoint`; its tensors must not change before `settle` returns.

        `stall_s` is how long training was blocked for it, for the record.
        """
        assert self._pending is None
        self._last, self._stall_s = checkpoint, stall_s
        self._pending = self._thread.submit(self._write, checkpoint)

    def poll(self) -> None:
        """Record a completed write, without waiting and without raising."""
        if self._pending is not None and self._pending.done():
            self._finish_write(self._pending)

    def score(self, *, step: int, epoch: float, top1: float) -> None:
        """Once the checkpoint of `step` is on disk, record it as the best one if it is."""
        self._score = {"step": step, "epoch": epoch, "top1": top1}
        self._note_score()

    def settle(self) -> None:
        """Wait for a write in progress.

        Raises RunError after more than `retries` failures in a row, or if the weights are not finite.
        """
        if self._pending is not None:
            self._finish_write(self._pending)
        if self._fatal:
            raise self._fatal

    def finish(self) -> None:
        """Wait until the last checkpoint is on disk, retrying if needed; RunError if that fails."""
        self.settle()
        while self._last is not None:
            time.sleep(RETRY_S)
            self.write(self._last, stall_s=self._stall_s)
            self.settle()

    def close(self) -> None:
        """Wait for a write in progress."""
        self._thread.shutdown(wait=True)
        self.poll()

    def _write(self, checkpoint: Checkpoint) -> Written:
        start = perf_counter()
        for name, tensor in (checkpoint.model | checkpoint.optimizer).items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise RunError(
                    f"{name} is not finite after step {checkpoint.state['step']}",
                    wanted="finite weights for a checkpoint",
                    fix="a smaller lr, or --set clip_norm; the last checkpoint is finite",
                )
        folder = write_checkpoint(self._run_dir, checkpoint)
        seconds = perf_counter() - start
        return Written(folder, seconds, drop_old(self._run_dir, keep=self._keep, newest=step_of(folder)))

    def _finish_write(self, pending: Future[Written]) -> None:
        self._pending = None  # first, so that `close` does not raise the same error (of memory, say) again
        try:
            written = pending.result()
        except DiskError as error:
            self._failures += 1
            self._note_failure(str(error))
        except RunError as error:
            self._fatal = error
        else:
            self._last, self._failures = None, 0
            log.info("checkpoint %s", written.folder)
            step, stall_ms = step_of(written.folder), 1e3 * self._stall_s
            self._record("checkpoint", step=step, stall_ms=stall_ms, write_s=written.seconds)
            self._note_score()
            for fault in written.left_over:
                if fault not in self._left_over:
                    log.warning(fault)
                    self._record("fault", fault=fault)
                self._left_over.add(fault)

    def _note_score(self) -> None:
        if not self._score or not checkpoint_folder(self._run_dir, self._score["step"]).is_dir():
            return
        try:
            record_score(self._run_dir, **self._score)
            self._score = {}
        except OSError as error:
            log.warning("the best checkpoint was not recorded: %s", error.strerror)

    def _note_failure(self, fault: str) -> None:
        left = self._retries - self._failures
        self._record("fault", fault=fault, failures=self._failures)
        if left >= 0:
            log.warning("%s; continuing; stops after %d more failure%s", fault, left + 1, "s"[: left > 0])
            return
        self._fatal = RunError(
            f"{fault}; {self._failures} failures in a row" if self._retries else fault,
            wanted="a writable folder with free space",
            fix="fix that; then the same command resumes from the last checkpoint",
        )
