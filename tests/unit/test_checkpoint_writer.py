"""The thread that writes checkpoints: what it puts up with, what it records, and which is the best."""

import shutil

import pytest
from small_checkpoints import checkpoint

from horovod_owt.errors import RunError
from horovod_owt.runs import checkpoints
from horovod_owt.runs.checkpoints import find_fault, list_checkpoints, read_best
from horovod_owt.train import checkpoint as module
from horovod_owt.train import checkpoint_writer
from horovod_owt.train.checkpoint import write_checkpoint
from horovod_owt.train.checkpoint_writer import CheckpointWriter


@pytest.fixture
def writer(tmp_path, monkeypatch):
    """A writer that puts up with one failure, and what it tells."""
    monkeypatch.setattr(checkpoint_writer, "RETRY_S", 0.01)
    told = []
    writer = CheckpointWriter(
        tmp_path, keep=1, retries=1, record=lambda kind, **values: told.append((kind, values))
    )
    writer.told = told
    yield writer
    writer.close()


def spoil(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")


def test_a_failed_write_is_told_and_put_up_with_as_often_as_asked(tmp_path, writer, caplog):
    spoil(tmp_path)
    writer.write(checkpoint(1))
    writer.settle()
    assert "step-00000001 not written" in caplog.text and "stops after 1 more" in caplog.text
    writer.write(checkpoint(2))
    with pytest.raises(RunError, match="step-00000002 not written"):
        writer.settle()
    assert [kind for kind, _ in writer.told] == ["fault", "fault"]


def test_another_error_than_the_disks_is_raised_once(tmp_path, writer, monkeypatch):
    """And not again when rank 0 closes the writer, before it writes the outcome."""

    def fail(tensors, path):
        raise MemoryError

    monkeypatch.setattr(module, "save_file", fail)
    writer.write(checkpoint(1))
    with pytest.raises(MemoryError):
        writer.settle()
    writer.close()


def test_a_disk_that_comes_back_is_forgiven(tmp_path, writer):
    spoil(tmp_path)
    writer.write(checkpoint(1))
    writer.settle()
    (tmp_path / "checkpoints").unlink()
    writer.write(checkpoint(2), stall_s=0.25)
    writer.settle()
    spoiled, written = writer.told
    assert written[0] == "checkpoint" and written[1]["step"] == 2 and written[1]["stall_ms"] == 250
    shutil.rmtree(tmp_path / "checkpoints")
    spoil(tmp_path)
    writer.write(checkpoint(3))
    writer.settle()  # the first failure again, not the second


def test_the_last_checkpoint_is_tried_again_until_it_is_there(tmp_path, writer, monkeypatch):
    spoil(tmp_path)
    writer.write(checkpoint(1))
    monkeypatch.setattr(checkpoint_writer.time, "sleep", lambda _: (tmp_path / "checkpoints").unlink())
    writer.finish()
    assert find_fault(tmp_path / "checkpoints" / "step-00000001") == ""


def test_the_last_checkpoint_that_cannot_be_written_is_an_error(tmp_path, writer):
    spoil(tmp_path)
    writer.write(checkpoint(1))
    with pytest.raises(RunError, match="2 failures in a row"):
        writer.finish()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_do_not_reach_the_disk(tmp_path, writer, number):
    write_checkpoint(tmp_path, checkpoint(1))
    bad = checkpoint(2)
    bad.optimizer["momentum.w"][1, 1] = number
    writer.write(bad)
    with pytest.raises(RunError, match="momentum.w is not finite after step 2"):
        writer.settle()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]


def test_an_old_one_that_cannot_be_deleted_is_told_once_and_no_reason_to_end(tmp_path, monkeypatch, caplog):
    told = []
    writer = CheckpointWriter(
        tmp_path, keep=1, retries=0, record=lambda kind, **values: told.append((kind, values))
    )

    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(checkpoints, "remove_folder", refuse)
    for step in (1, 2, 3):
        writer.write(checkpoint(step))
        writer.settle()
    writer.close()
    assert [values["step"] for kind, values in told if kind == "checkpoint"] == [1, 2, 3]
    faults = [values["fault"] for kind, values in told if kind == "fault"]
    assert faults == [
        f"old checkpoint {tmp_path}/checkpoints/step-0000000{n} not deleted: Permission denied"
        for n in (1, 2)
    ]
    assert caplog.text.count("not deleted") == 2


def test_the_best_is_one_that_the_disk_has_taken(tmp_path, writer, monkeypatch):
    def refuse(tensors, path):
        raise OSError(122, "Disk quota exceeded")

    writer.write(checkpoint(1))
    writer.score(step=1, epoch=0.5, top1=10.0)  # perhaps before it is written
    writer.settle()
    assert read_best(tmp_path)["step"] == 1
    with monkeypatch.context() as full:
        full.setattr(module, "save_file", refuse)
        writer.write(checkpoint(2))
        writer.score(step=2, epoch=1.0, top1=90.0)
        writer.settle()
        writer.score(step=2, epoch=1.0, top1=90.0)  # or after
    assert read_best(tmp_path)["step"] == 1
    writer.write(checkpoint(3))
    writer.score(step=3, epoch=1.5, top1=20.0)
    writer.settle()
    assert read_best(tmp_path) == {"step": 3, "epoch": 1.5, "top1": 20.0}


def test_a_later_one_that_could_not_be_moved_aside_does_not_cost_the_one_just_written(tmp_path, writer):
    write_checkpoint(tmp_path, checkpoint(6))
    writer.write(checkpoint(2))
    writer.settle()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000006", "step-00000002"]


def test_one_that_is_being_written_when_the_run_fails_is_recorded(tmp_path, writer):
    writer.score(step=1, epoch=0.5, top1=10.0)
    writer.write(checkpoint(1))
    writer.close()
    assert [(kind, values["step"]) for kind, values in writer.told] == [("checkpoint", 1)]
    assert read_best(tmp_path)["step"] == 1
