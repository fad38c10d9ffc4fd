"""TensorBoard's files, read back by TensorBoard's own reader."""

import logging
import math
import threading
import time
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from horovod_owt.data.batch import MEAN, STD
from horovod_owt.monitoring import tensorboard as module
from horovod_owt.monitoring.tensorboard import TensorBoard


def step(number: int, **values) -> dict:
    speed = {"images_per_s": 80.0, "step_ms": 100.0, "data_wait_ms": 1.0, "exposed_comm_ms": 9.0}
    return {"step": number, "epoch": number / 10, "loss": float(number), "lr": 0.1, **speed, **values}


def read(folder) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance=dict.fromkeys(("histograms", "images"), 0))
    events.Reload()
    return events


def test_steps_are_means_and_a_resumed_attempt_replaces_what_was_lost(tmp_path):
    first = TensorBoard(tmp_path / "tb", first_step=1, every=10)
    for number in range(1, 38):  # then the attempt is killed; its last checkpoint is of step 20
        first.record("step", step(number))
    first.close()
    second = TensorBoard(tmp_path / "tb", first_step=21, every=10)
    for number in range(21, 41):
        second.record("step", step(number, loss=-1.0, grad_norm=2.0))
    second.close()
    seen = read(tmp_path / "tb")
    losses = [(event.step, event.value) for event in seen.Scalars("train/loss")]
    assert losses == [(10, 5.5), (20, 15.5), (30, -1), (40, -1)]
    assert [e.value for e in seen.Scalars("train/gradient_norm")] == [2.0, 2.0]
    assert seen.Scalars("speed/step_ms")[0].value == 100


def test_an_attempt_comes_after_those_before_it_though_the_clock_was_set_back(tmp_path, monkeypatch):
    for first, now in ((1, 2e9), (3, 1e9), (5, 1e9)):  # of hosts with other clocks
        monkeypatch.setattr(time, "time", lambda now=now: now)
        board = TensorBoard(tmp_path / "tb", first_step=first, every=1)
        for number in range(first, first + 4):
            board.record("step", step(number, loss=float(first)))
        board.close()
    losses = [(event.step, event.value) for event in read(tmp_path / "tb").Scalars("train/loss")]
    assert losses == [(1, 1), (2, 1), (3, 3), (4, 3), (5, 5), (6, 5), (7, 5), (8, 5)]


def test_the_averaged_weights_have_curves_of_their_own(tmp_path):
    board = TensorBoard(tmp_path / "tb", first_step=1, every=1)
    scores = {"step": 4, "loss": 2.0, "top1": 50.0, "top5": 90.0}
    board.record("validation", scores)
    board.record("validation", {**scores, "step": 8, "averaged_top1": 60.0})
    board.close()
    seen = read(tmp_path / "tb")
    assert [(event.step, event.value) for event in seen.Scalars("validation/averaged_top1")] == [(8, 60)]
    assert [event.step for event in seen.Scalars("validation/top1")] == [4, 8]


def test_inputs_are_shown_as_the_net_gets_them(tmp_path):
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    pixels = torch.randint(0, 256, (12, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    board = TensorBoard(tmp_path / "tb", first_step=1, every=10)
    batch = (pixels / 255 - mean) / std
    board.images(1, batch)
    batch.zero_()  # the caller's memory is its own again
    board.close()
    seen = read(tmp_path / "tb")
    assert len(seen.Tags()["images"]) == module.IMAGES
    shown = Image.open(BytesIO(seen.Images("augmented/3")[0].encoded_image_string))
    assert np.abs(np.asarray(shown).astype(int) - pixels[3].permute(1, 2, 0).numpy()).max() <= 1


def test_classes_have_curves_if_they_are_few_and_the_worst_are_listed(tmp_path):
    board = TensorBoard(tmp_path / "tb", first_step=1, every=10)
    board.record("validation", {"step": 5, "loss": 1.5, "top1": 60.0, "top5": 90.0})
    board.per_class(5, [75.0, math.nan, 50.0], ["caf\udce9", "no images", "dog"])  # one is not UTF-8
    board.per_class(6, [float(n) for n in range(100)], [f"c{n}" for n in range(100)])
    board.close()
    seen = read(tmp_path / "tb")
    curves = {tag for tag in seen.Tags()["scalars"] if tag.startswith("class_top1/")}
    assert curves == {r"class_top1/caf\udce9", "class_top1/dog"}
    assert seen.Scalars("validation/top1")[0].value == 60
    assert len(seen.Histograms("validation/top1_of_classes")) == 2
    worst = seen.Tensors("validation/worst_classes/text_summary")[1].tensor_proto.string_val[0].decode()
    assert "| c0 | 0.0 |" in worst and "c20" not in worst


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device"), "No space left on device; TensorBoard gets no more"),
        (ValueError("odd"), "ValueError: odd; TensorBoard gets no more"),
    ],
)
def test_an_error_is_one_warning_and_no_more_files(tmp_path, monkeypatch, caplog, error, told):
    def refuse(*_):
        raise error

    monkeypatch.setattr(module.RecordWriter, "write", refuse)
    board = TensorBoard(tmp_path / "tb", first_step=1, every=1)
    for number in range(1, 100):
        board.record("step", step(number))
    board.close()
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert told in warning and not board._thread.is_alive()


def test_a_disk_that_hangs_holds_up_the_end_for_a_time_only(tmp_path, monkeypatch, caplog):
    released = threading.Event()
    monkeypatch.setattr(module.RecordWriter, "write", lambda *_: released.wait(60))
    monkeypatch.setattr(module, "CLOSE_S", 0.1)
    board = TensorBoard(tmp_path / "tb", first_step=1, every=1)
    board.record("step", step(1))
    board.close()
    released.set()
    board._thread.join(10)
    assert "the disk does not answer" in caplog.text


@pytest.mark.parametrize("every", [1, 10])
def test_the_training_thread_only_queues(tmp_path, monkeypatch, every):
    """What builds and writes events runs in the other thread."""
    threads = set()
    scalar = module.summary.scalar
    monkeypatch.setattr(
        module.summary, "scalar", lambda *a: threads.add(threading.current_thread().name) or scalar(*a)
    )
    board = TensorBoard(tmp_path / "tb", first_step=1, every=every)
    for number in range(1, 21):
        board.record("step", step(number))
    board.close()
    assert threads == {"tensorboard"}
