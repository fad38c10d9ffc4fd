"""Checkpoints: whole or absent, and the newest sound one wins."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from horovod_owt import files
from horovod_owt.cli import cli
from horovod_owt.commands import checkpoint as commands
from horovod_owt.config import TrainConfig
from horovod_owt.errors import ConfigError, ProblemFound, RunError
from horovod_owt.runs import checkpoints
from horovod_owt.runs.attempts import AttemptWatch
from horovod_owt.runs.checkpoints import (
    FILES,
    MANIFEST,
    drop_old,
    find_fault,
    intact_checkpoint,
    list_checkpoints,
    newest_intact,
    read_best,
    record_score,
    resume_at,
)
from horovod_owt.runs.opening import Resume, open_run_folder
from horovod_owt.runs.owner import Ownership
from horovod_owt.train import checkpoint as module
from horovod_owt.train import checkpoint_writer
from horovod_owt.train.checkpoint import Checkpoint, DiskError, read_checkpoint, write_checkpoint
from horovod_owt.train.checkpoint_writer import CheckpointWriter
from horovod_owt.train.watch import _how_to_resume


def checkpoint(step: int) -> Checkpoint:
    values = torch.arange(6.0).view(2, 3) + step
    state = {"step": step, "samples_consumed": 32 * step, "num_samples": 96}
    return Checkpoint({"w": values}, {"momentum.w": -values}, state)


def open_folder(run_dir):
    """As a run of these checkpoints does."""
    data = {"fingerprint": "x", "train_images": 96, "val_images": 26, "classes": ["a", "b"]}
    with Ownership() as ownership:
        return open_run_folder(run_dir, TrainConfig(classes=2), data, Resume(), ownership)


def test_what_was_written_is_read(tmp_path):
    folder = write_checkpoint(tmp_path, checkpoint(7))
    assert folder == tmp_path / "checkpoints" / "step-00000007"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, MANIFEST])
    back = read_checkpoint(folder)
    assert torch.equal(back.model["w"], checkpoint(7).model["w"])
    assert torch.equal(back.optimizer["momentum.w"], checkpoint(7).optimizer["momentum.w"])
    assert back.state == checkpoint(7).state


def test_the_newest_few_are_kept(tmp_path):
    for step in (9, 10, 11, 100):
        write_checkpoint(tmp_path, checkpoint(step))
        drop_old(tmp_path, keep=2, newest=step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000100", "step-00000011"]


def flip_a_byte(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)


DAMAGE = {
    "flipped": lambda folder, name: flip_a_byte(folder, name),
    "cut": lambda folder, name: (folder / name).write_bytes((folder / name).read_bytes()[:-5]),
    "gone": lambda folder, name: (folder / name).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, caplog, name, damage):
    older = write_checkpoint(tmp_path, checkpoint(1))
    newer = write_checkpoint(tmp_path, checkpoint(2))
    DAMAGE[damage](newer, name)
    assert newest_intact(tmp_path) == older
    assert str(newer) in caplog.text
    with pytest.raises(RunError, match="step-00000002"):
        intact_checkpoint(newer)
    assert intact_checkpoint(older) == older


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES])
def test_a_file_that_the_machine_does_not_give_is_not_damaged(tmp_path, monkeypatch, number):
    """Taken for damaged, a good checkpoint would be moved aside and its steps lost."""
    older, newer = (write_checkpoint(tmp_path, checkpoint(step)) for step in (1, 2))
    record_score(tmp_path, step=1, epoch=1.0, top1=50.0)
    real_open = Path.open

    def no_model_and_no_best(self, *args, **options):
        if self == newer / "model.safetensors" or self.name == "best.json":
            raise OSError(number, os.strerror(number), str(self))
        return real_open(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", no_model_and_no_best)
        with pytest.raises(RunError, match=f"model.safetensors: {os.strerror(number)}; fix"):
            newest_intact(tmp_path)
        (kept,) = drop_old(tmp_path, keep=1, newest=2)
        assert "old checkpoints kept" in kept and os.strerror(number) in kept
        verified = owt_checkpoint("verify", tmp_path)
        assert verified.exception.exit_code == 3 and "step-00000001  whole" in verified.stdout
        assert f"step-00000002  unreadable: {newer}" in verified.stdout
    assert newest_intact(tmp_path) == newer and older.is_dir()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES])
def test_checkpoints_that_the_machine_does_not_list_are_not_taken_for_none(tmp_path, monkeypatch, number):
    """The run would start from initial weights, and move its checkpoints aside when they are seen again."""
    folder = write_checkpoint(tmp_path, checkpoint(7))
    real_scandir = os.scandir

    def no_list(path):
        if Path(path) == folder.parent:
            raise OSError(number, os.strerror(number), str(path))
        return real_scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", no_list)
        with pytest.raises(RunError, match=f"checkpoints: {os.strerror(number)}; fix"):
            open_folder(tmp_path)
        (kept,) = drop_old(tmp_path, keep=1, newest=8)
        assert "old checkpoints kept" in kept and os.strerror(number) in kept
        assert f"--run-dir {tmp_path} resumes" in _how_to_resume(tmp_path)  # of a job that hangs
        assert AttemptWatch(tmp_path).attempt(1, asked_to_stop=False).checkpoint == ""
    assert newest_intact(tmp_path) == folder


def test_no_checkpoint_is_no_error(tmp_path):
    assert newest_intact(tmp_path) is None


def test_a_write_that_fails_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, checkpoint(1))

    def full_disk(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full_disk)
    with pytest.raises(DiskError, match="No space left on device"):
        write_checkpoint(tmp_path, checkpoint(2))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert find_fault(tmp_path / "checkpoints" / "step-00000001") == ""


def test_the_remains_of_a_killed_write_are_no_checkpoint_and_in_nobodys_way(tmp_path):
    folder = write_checkpoint(tmp_path, checkpoint(1))
    for step in (2, 3):
        shutil.copytree(folder, folder.with_name(f".step-0000000{step}.partial"))
    assert list_checkpoints(tmp_path) == [folder]
    write_checkpoint(tmp_path, checkpoint(2))
    assert not list(folder.parent.glob(".*.partial"))


def test_the_best_one_stays_however_old(tmp_path, caplog):
    for step, top1 in ((1, 10.0), (2, 30.0), (3, 30.0), (4, 20.0), (5, 5.0)):
        write_checkpoint(tmp_path, checkpoint(step))
        drop_old(tmp_path, keep=1, newest=step)
        assert record_score(tmp_path, step=step, epoch=step / 2, top1=top1) == (step in (1, 2))
    assert read_best(tmp_path) == {"step": 2, "epoch": 1.0, "top1": 30.0}
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000005", "step-00000002"]
    (tmp_path / "checkpoints" / "best.json").write_text("{half")
    assert read_best(tmp_path) == {} and "best.json is damaged" in caplog.text


def test_damaged_ones_alone_are_not_taken_for_a_fresh_start(tmp_path):
    for step in (1, 2):
        flip_a_byte(write_checkpoint(tmp_path, checkpoint(step)), "model.safetensors")
    with pytest.raises(RunError, match="none of 2 checkpoints is intact") as caught:
        newest_intact(tmp_path)
    assert "owt checkpoint verify" in caught.value.fix


def owt_checkpoint(*words):
    return CliRunner().invoke(cli, ["checkpoint", *map(str, words)])


def test_the_list_has_the_newest_first_and_names_the_best(tmp_path):
    for step in (1, 2):
        write_checkpoint(tmp_path, checkpoint(step))
        record_score(tmp_path, step=step, epoch=step / 2, top1=30.0 / step)
    newest, best = owt_checkpoint("list", tmp_path).stdout.splitlines()[1:]
    assert newest.split()[0] == "2" and "best" not in newest
    assert best.split()[0] == "1" and best.endswith("best: top-1 30.00 %")
    rows = json.loads(owt_checkpoint("list", tmp_path, "--json").stdout)["checkpoints"]
    assert [row["step"] for row in rows] == [2, 1] and rows[1]["best_top1"] == 30
    assert all(
        row["bytes"] == sum(p.stat().st_size for p in list_checkpoints(tmp_path)[0].iterdir()) for row in rows
    )


def test_one_that_cannot_be_looked_into_does_not_hide_the_others(tmp_path):
    write_checkpoint(tmp_path, checkpoint(2))
    (tmp_path / "checkpoints" / "step-00000009").write_text("")
    done = owt_checkpoint("list", tmp_path)
    lines = [line.split() for line in done.output.splitlines()[1:]]
    assert done.exit_code == 0 and lines[0] == ["9", "?", "?", "?"] and lines[1][0] == "2"
    done = owt_checkpoint("list", tmp_path, "--json")
    assert [row["bytes"] is None for row in json.loads(done.output)["checkpoints"]] == [True, False]


def test_verify_names_each_damaged_one_and_ends_with_3(tmp_path):
    sound, damaged = (write_checkpoint(tmp_path, checkpoint(step)) for step in (1, 2))
    assert owt_checkpoint("verify", tmp_path).exit_code == 0
    flip_a_byte(damaged, "optimizer.safetensors")
    done = owt_checkpoint("verify", tmp_path)
    fault = f"optimizer.safetensors does not match {MANIFEST}"
    assert done.stdout.splitlines() == [f"step-00000002  {fault}", "step-00000001  whole"]
    assert isinstance(done.exception, ProblemFound) and done.exception.exit_code == 3
    said = json.loads(owt_checkpoint("verify", tmp_path, "--json").stdout)
    assert said["checkpoints"] == [
        {"path": str(damaged), "fault": fault},
        {"path": str(sound), "fault": ""},
    ]


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    for folder, why in ((tmp_path, "has no checkpoints"), (tmp_path / "none", "does not exist")):
        done = owt_checkpoint("list", folder)
        assert isinstance(done.exception, ConfigError) and why in str(done.exception)


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


def counted(monkeypatch) -> list[str]:
    """The files that were hashed."""
    hashed, sha256 = [], checkpoints._sha256
    monkeypatch.setattr(checkpoints, "_sha256", lambda path: hashed.append(path.name) or sha256(path))
    return hashed


def test_a_resume_hashes_each_file_once(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, checkpoint(1))
    hashed = counted(monkeypatch)
    opened = open_folder(tmp_path)
    assert read_checkpoint(opened.checkpoint).state["step"] == 1
    assert sorted(hashed) == sorted(FILES)


def log_runs(run_dir, *lines):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"kind": kind, **values}) + "\n" for kind, values in lines)


def test_what_is_later_than_the_step_of_a_resume_is_moved_aside(tmp_path, caplog):
    """The best one too; then the best of those that are left is the best."""
    scores = {1: 10.0, 2: 30.0, 3: 20.0, 6: 60.0}
    for step, top1 in scores.items():
        write_checkpoint(tmp_path, checkpoint(step))
        record_score(tmp_path, step=step, epoch=step / 2, top1=top1)
        log_runs(tmp_path, ("validation", {"step": step, "epoch": step / 2, "top1": top1}))
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000002")
    resume_at(tmp_path, 3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000001"]
    assert (tmp_path / "checkpoints" / "step-00000006.damaged").is_dir() and "moved to" in caplog.text
    assert read_best(tmp_path) == {"step": 3, "epoch": 1.5, "top1": 20.0}
    write_checkpoint(tmp_path, checkpoint(6))
    resume_at(tmp_path, 3)  # again
    assert len(list(tmp_path.glob("checkpoints/*.damaged"))) == 1
    for step in (1, 3):
        shutil.rmtree(tmp_path / "checkpoints" / f"step-0000000{step}")
    resume_at(tmp_path, 0)
    assert read_best(tmp_path) == {} and not (tmp_path / "checkpoints" / "best.json").exists()


def test_a_damaged_best_json_is_made_anew_from_the_validations_that_count(tmp_path, caplog):
    for step in (1, 2):
        write_checkpoint(tmp_path, checkpoint(step))
    log_runs(tmp_path, ("validation", {"step": 1, "epoch": 0.5, "top1": 20.0}))
    log_runs(tmp_path, ("validation", {"step": 2, "epoch": 1, "top1": 90.0}), ("run", {"first_step": 1}))
    log_runs(tmp_path, ("validation", {"step": 2, "epoch": 1, "top1": 20.0}))
    (tmp_path / "checkpoints" / "best.json").write_text("\0\0\0")
    resume_at(tmp_path, 2)
    assert read_best(tmp_path) == {"step": 1, "epoch": 0.5, "top1": 20.0} and "now {'step': 1" in caplog.text


@pytest.mark.parametrize("noted", [True, False])
def test_a_validation_just_before_a_kill_counts_for_the_best(tmp_path, noted):
    """Its record is written before best.json, which waits for the checkpoint to be on disk."""
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, checkpoint(step))
    scores = [{"step": step, "epoch": step / 2, "top1": top1} for step, top1 in ((1, 20.0), (2, 50.0))]
    if noted:
        record_score(tmp_path, **scores[0])
    damaged = {"step": 3, "epoch": 1.5, "top1": None}
    log_runs(tmp_path, *(("validation", score) for score in [*scores, damaged]))
    resume_at(tmp_path, 3)
    assert read_best(tmp_path) == scores[1]
    write_checkpoint(tmp_path, checkpoint(4))
    drop_old(tmp_path, keep=1, newest=4)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000004", "step-00000002"]


def test_what_a_run_writes_stays_although_a_later_one_could_not_be_moved(tmp_path, monkeypatch, caplog):
    for step in (1, 6):
        write_checkpoint(tmp_path, checkpoint(step))

    def refuse(source, target):
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr("horovod_owt.filesystem.os.replace", refuse)
        resume_at(tmp_path, 1)
    assert "step-00000006 could not be moved aside: Operation not permitted" in caplog.text
    write_checkpoint(tmp_path, checkpoint(2))
    assert drop_old(tmp_path, keep=1, newest=2) == []
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000006", "step-00000002"]


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


def test_one_whose_files_stay_is_out_of_the_way_whole(tmp_path, monkeypatch):
    """As with an immutable file, or one that is open on NFS."""
    for step in (1, 2):
        write_checkpoint(tmp_path, checkpoint(step))
    monkeypatch.setattr(
        files.shutil, "rmtree", lambda folder, **_: (_ for _ in ()).throw(OSError(16, "busy"))
    )
    (fault,) = drop_old(tmp_path, keep=1, newest=2)
    assert "step-00000001 not deleted: busy" in fault
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002"]
    assert drop_old(tmp_path, keep=1, newest=2) == []


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


@pytest.mark.parametrize(("command", "looks"), [("list", "read_state"), ("verify", "find_fault")])
def test_one_that_the_run_deletes_meanwhile_is_passed_over(tmp_path, monkeypatch, command, looks):
    older, newer = (write_checkpoint(tmp_path, checkpoint(step)) for step in (1, 2))
    look = getattr(commands, looks)

    def deleted_before(folder):
        if folder == older:
            shutil.rmtree(older)
        return look(folder)

    monkeypatch.setattr(commands, looks, deleted_before)
    done = owt_checkpoint(command, tmp_path, "--json")
    assert done.exit_code == 0, done.exception
    assert [row["path"] for row in json.loads(done.stdout)["checkpoints"]] == [str(newer)]
