"""Disks that refuse, on a real small file system: training goes on, and what was on disk stays."""

import os
import subprocess
from contextlib import contextmanager

import pytest
import torch
from real_ranks import NARROW, SMALL, outcome, records, settings, wait_for

from horovod_owt.errors import RunError
from horovod_owt.runs.checkpoints import find_fault, list_checkpoints
from horovod_owt.runs.records import MetricsLog
from horovod_owt.train.checkpoint import Checkpoint
from horovod_owt.train.checkpoint_writer import CheckpointWriter

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs: needs root")


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 64 MB: two checkpoints of a narrow net and a bit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=64m", "none", str(disk)]
    mounted = subprocess.run(["mount", *options], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk, leave: int) -> None:
    """Leave so many bytes free."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    with open(disk / "filler", "ab") as file:
        os.posix_fallocate(file.fileno(), 0, free - leave)


def test_a_full_disk_is_tolerated_for_some_intervals_and_the_next_run_resumes(start, run, images, small_disk):
    run_dir = small_disk / "run"
    command = [*NARROW, "train", images, "--run-dir", run_dir, *SMALL]
    command += settings(checkpoint_every=4, checkpoint_retries=2, keep_checkpoints=1)
    job = start(command)
    wait_for(lambda: list_checkpoints(run_dir))
    fill(small_disk, leave=4096)
    done = job.finish()
    assert done.exit_code != 0
    said = done.stderr
    assert "not written: " in said and "No space left on device" in said
    assert "continuing; stops after 2 more failures" in said
    assert "continuing; stops after 1 more failure" in said
    assert "3 failures in a row" in said and "a bug" not in said
    (last,) = list_checkpoints(run_dir)
    assert find_fault(last) == ""
    assert not list((run_dir / "checkpoints").glob(".*.partial"))

    (small_disk / "filler").unlink()
    until = int(last.name[5:]) + 4
    run([*command, *settings(max_steps=until)])
    assert outcome(run_dir)["exit_code"] == 0
    assert list_checkpoints(run_dir)[0].name == f"step-{until:08d}"
    done_twice = [record["step"] for record in records(run_dir, "step")]  # every line is whole
    assert done_twice[-4:] == list(range(until - 3, until + 1))


@contextmanager
def full(disk):
    fill(disk, leave=1_000_000)
    yield
    (disk / "filler").unlink()


@contextmanager
def read_only(disk):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    yield
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)


@contextmanager
def gone(disk):
    """As a file server that is no more: the mount is moved away, its empty place remains."""
    away = disk.with_name("away")
    away.mkdir()
    for way in ((disk, away), (away, disk)):
        subprocess.run(["mount", "--move", *map(str, way)], check=True)
        if way[0] == disk:
            yield
            assert not list(disk.iterdir())


@pytest.mark.parametrize(
    ("refusing", "says"),
    [
        pytest.param(full, "No space left", id="full"),
        pytest.param(read_only, "Read-only", id="read-only", marks=pytest.mark.slow),
        pytest.param(gone, "No such file", id="gone", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_takes_writes_again_gets_the_next_checkpoint(small_disk, caplog, refusing, says):
    run_dir = small_disk / "run"
    run_dir.mkdir()
    tensors = {"w": torch.randn(4_000_000)}
    writer = CheckpointWriter(run_dir, keep=1, retries=1, record=lambda kind, **values: None)

    def write(step: int) -> None:
        writer.write(Checkpoint(tensors, {}, {"step": step}))
        writer.settle()

    write(1)
    with refusing(small_disk):
        write(2)
        assert says in caplog.text
        with pytest.raises(RunError, match=says):
            write(3)
    writer.close()
    (first,) = list_checkpoints(run_dir)
    assert first.name == "step-00000001" and find_fault(first) == ""
    writer = CheckpointWriter(run_dir, keep=1, retries=1, record=lambda kind, **values: None)
    write(4)
    writer.close()
    (fourth,) = list_checkpoints(run_dir)
    assert fourth.name == "step-00000004" and find_fault(fourth) == ""


def test_metrics_lines_wait_for_a_full_disk(small_disk, caplog):
    metrics = MetricsLog(small_disk)
    fill(small_disk, leave=0)
    for step in range(2000):  # tmpfs gives the file's last page to the end
        metrics.write("step", step=step)
    assert "No space left on device" in caplog.text and len(caplog.records) == 1
    (small_disk / "filler").unlink()
    metrics.write("step", step=2000)
    metrics.close()
    assert [record["step"] for record in records(small_disk, "step")] == list(range(2001))


def test_half_a_line_of_a_killed_run_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "step", "step": 1}\n{"kind": "st')
    metrics = MetricsLog(tmp_path)
    metrics.write("step", step=2)
    metrics.close()
    assert [record["step"] for record in records(tmp_path, "step")] == [1, 2]
