"""What a run begins with: whose folder, which checkpoint, what data."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from horovod_owt.config import TrainConfig
from horovod_owt.data.store import open_data_set
from horovod_owt.data.synthetic import write_synthetic
from horovod_owt.errors import ConfigError, RunError
from horovod_owt.runs import owner
from horovod_owt.runs.attempts import JOB, is_same_job, job_name
from horovod_owt.runs.checkpoints import (
    FILES,
    checkpoint_folder,
    list_checkpoints,
    new_checkpoint,
    write_state,
)
from horovod_owt.runs.folder import read_outcome, write_outcome
from horovod_owt.runs.opening import Opened, Resume, data_differences, open_run_folder
from horovod_owt.runs.owner import Ownership
from horovod_owt.runs.records import MetricsLog

CFG = TrainConfig(classes=2)
DATA = {"fingerprint": "6 + 2 images", "train_images": 6, "val_images": 2, "classes": ["cat", "dog"]}


@pytest.fixture(autouse=True)
def nobodys_job(monkeypatch):
    for name in (JOB, "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "HOROVOD_ELASTIC"):
        monkeypatch.delenv(name, raising=False)


def write(run_dir, step, **state):
    """A checkpoint without tensors."""
    run_dir.mkdir(exist_ok=True)
    with new_checkpoint(run_dir, step) as scratch:
        for name in FILES:
            (scratch / name).write_text("")
        write_state(scratch, {"step": step, "num_samples": 6, "data": DATA, "config": CFG.to_dict(), **state})
    return checkpoint_folder(run_dir, step)


def start(run_dir, how="auto", *, cfg=CFG, data=DATA, other_data=False) -> Opened:
    with Ownership() as ownership:
        return open_run_folder(run_dir, cfg, data, Resume(how, other_data), ownership)


def damage(folder):
    (folder / "model.safetensors").write_text("x")


def test_a_new_folder_gets_the_configuration_and_initial_weights(tmp_path):
    for how in ("auto", "never"):
        assert start(tmp_path / "a" / "b", how) == Opened(tmp_path / "a" / "b")
        assert json.loads((tmp_path / "a" / "b" / "config.json").read_text()) == CFG.to_dict()


def test_the_newest_sound_checkpoint_is_resumed_and_a_damaged_one_is_out_of_the_way(tmp_path):
    second, fourth = write(tmp_path, 2), write(tmp_path, 4)
    assert start(tmp_path).checkpoint == fourth
    damage(fourth)
    assert start(tmp_path).checkpoint == second
    assert list_checkpoints(tmp_path) == [second]
    damage(second)
    with pytest.raises(RunError, match="none of 1 checkpoints is intact"):
        start(tmp_path)


def test_a_job_that_began_from_a_path_goes_on_from_its_own_newest_checkpoint(tmp_path):
    base = write(tmp_path / "base", 1)
    first = start(tmp_path / "new", str(base))
    assert first == Opened(tmp_path / "new", base, str(base))
    own = write(tmp_path / "new", 3, began_from=first.began_from)
    again = Opened(tmp_path / "new", own, str(base))
    assert start(tmp_path / "new", str(base)) == again
    assert start(tmp_path / "new", os.path.relpath(base)) == again
    assert start(tmp_path / "new") == again  # auto, and so a second requeue of either command goes on
    damage(base)
    assert start(tmp_path / "new", str(base)) == again
    with pytest.raises(RunError, match="does not match"):
        start(tmp_path / "other", str(base))


def test_the_global_batch_that_an_elastic_run_keeps_is_that_of_its_own_checkpoint(tmp_path):
    own = write(tmp_path / "run", 3, kept_global_batch=60)
    assert start(tmp_path / "run").kept_global_batch == 60
    assert start(tmp_path / "new", str(own)).kept_global_batch == 0


def test_to_go_back_is_refused_with_the_way_to_do_it(tmp_path):
    base = write(tmp_path / "base", 1)
    earlier, newest = (write(tmp_path / "run", step) for step in (2, 6))
    for path in (base, earlier):
        with pytest.raises(ConfigError) as caught:
            start(tmp_path / "run", str(path))
        saw, wanted, fix = caught.value.args
        assert "is at step 6" in saw and "would go back" in saw
        assert f"another --run-dir to start from {path}" in fix and "--resume auto" in fix
    assert list_checkpoints(tmp_path / "run") == [newest, earlier]
    assert start(tmp_path / "new", str(earlier)).checkpoint == earlier
    assert start(tmp_path / "run", str(newest)).checkpoint == newest  # which is no way back
    write(tmp_path / "run", 8, began_from=str(newest))
    assert start(tmp_path / "run", str(newest)).checkpoint == checkpoint_folder(tmp_path / "run", 8)


def test_never_means_never_before_this_job(tmp_path, monkeypatch):
    monkeypatch.setenv(JOB, "mine")
    own = write(tmp_path, 3, job=job_name(os.environ))
    assert start(tmp_path, "never").checkpoint == own
    monkeypatch.setenv(JOB, "another")
    with pytest.raises(ConfigError, match="contains a run with checkpoints; .*for --resume never"):
        start(tmp_path, "never")
    monkeypatch.delenv(JOB)
    with pytest.raises(ConfigError, match="contains a run with checkpoints"):
        start(tmp_path, "never")


ELASTIC = {"HOROVOD_ELASTIC": "1", "HOROVOD_GLOO_RENDEZVOUS_ADDR": "n1", "HOROVOD_GLOO_RENDEZVOUS_PORT": "5"}


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ({JOB: "a"}, {JOB: "a"}, True),
        ({JOB: "a"}, {JOB: "b"}, False),
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, True),
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7"}, False),  # two commands in a shell of salloc
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}, False),
        (ELASTIC, ELASTIC, True),
        (ELASTIC, {**ELASTIC, "HOROVOD_GLOO_RENDEZVOUS_PORT": "6"}, False),
        ({}, {}, False),
    ],
)
def test_a_job_is_known_by_whoever_starts_it_again(first, second, same):
    assert is_same_job(job_name(first), second) is same


@pytest.mark.parametrize(
    ("now", "says"),
    [
        ({"train_images": 7}, "6 training images, now 7"),
        ({"val_images": 9}, "2 validation images, now 9"),
        ({"classes": ["dog", "zebra"]}, "2 of 2 labels changed class, first 0: cat, now dog"),
        ({"classes": ["cat"]}, "1 of 2 labels changed class, first 1: dog, now none"),
        ({"fingerprint": "else"}, "other file names, or files in other classes"),
    ],
)
def test_another_data_set_is_refused_with_what_differs_unless_it_is_meant(tmp_path, caplog, now, says):
    own = write(tmp_path, 3)
    for run_dir, how in ((tmp_path, "auto"), (tmp_path / "new", str(own))):
        with pytest.raises(ConfigError) as caught:
            start(run_dir, how, data={**DATA, **now})
        assert says in str(caught.value) and "--other-data" in caught.value.fix
        assert not (run_dir / "config.json").exists()
        assert start(run_dir, how, data={**DATA, **now}, other_data=True).checkpoint == own
        assert says in caplog.text
        (run_dir / "config.json").unlink()


def test_a_checkpoint_that_knows_only_how_many_images_it_saw_is_held_to_that(tmp_path):
    write(tmp_path, 3, data=None)
    assert start(tmp_path).checkpoint
    with pytest.raises(ConfigError, match="6 training images, now 8"):
        start(tmp_path, data={**DATA, "train_images": 8})


def test_a_renamed_class_is_another_data_set_and_a_packed_copy_is_not(tmp_path):
    write_synthetic(tmp_path / "d", classes=2, train_per_class=3, val_per_class=1, size=(80, 90))
    before = open_data_set(tmp_path / "d").identity()
    json.dumps(before)
    assert (before["train_images"], before["val_images"]) == (6, 2) and len(before["classes"]) == 2
    assert data_differences(before, open_data_set(tmp_path / "d").identity()) == ""
    first = before["classes"][0]
    for split in ("train", "val"):
        (tmp_path / "d" / split / first).rename(tmp_path / "d" / split / "z")
    assert f"0: {first}, now" in data_differences(before, open_data_set(tmp_path / "d").identity())


@pytest.mark.parametrize(
    ("key", "value"), [("model", "alexnet-owt-bn"), ("classes", 3), ("image_size", 64), ("seed", 1)]
)
def test_what_shapes_the_net_and_the_order_of_samples_stays(tmp_path, key, value):
    before = CFG.to_dict()
    changed = TrainConfig(**{**before, key: value})
    start(tmp_path)
    start(tmp_path, cfg=changed)  # no checkpoint yet: it starts afresh
    start(tmp_path)
    write(tmp_path, 1)
    with pytest.raises(ConfigError, match=f"was trained with {key}={before[key]}"):
        start(tmp_path, cfg=changed)
    assert json.loads((tmp_path / "config.json").read_text()) == before
    for damaged in (b"{half", b"\0\0"):  # the checkpoint knows
        (tmp_path / "config.json").write_bytes(damaged)
        with pytest.raises(ConfigError, match=f"was trained with {key}={before[key]}"):
            start(tmp_path, cfg=changed)
        assert start(tmp_path).checkpoint
        assert json.loads((tmp_path / "config.json").read_text()) == before


def test_a_run_whose_checkpoints_are_gone_is_not_started_anew_unless_that_is_asked_for(tmp_path):
    base, run = write(tmp_path / "base", 1), tmp_path / "run"

    def ran(first_step, *checkpoints):
        log = MetricsLog(run)
        log.write("run", first_step=first_step)
        for step in checkpoints:
            log.write("step", step=step)
            log.write("checkpoint", step=step)
        log.write("step", step=99)
        log.close()

    start(run)
    ran(0)
    assert start(run).checkpoint is None  # killed before its first checkpoint
    ran(0, 2, 4)
    ran(4)
    for how in ("auto", str(base)):
        with pytest.raises(RunError, match="records of a checkpoint after step 4, but no checkpoints"):
            start(run, how)
    assert start(run, "never").checkpoint is None
    ran(0)
    assert start(run).checkpoint is None


def test_checkpoints_behind_a_link_to_a_disk_that_is_not_mounted_are_not_taken_for_none(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk")
    with pytest.raises(RunError, match=f"is a link to {tmp_path}/disk, which does not exist"):
        start(tmp_path / "run")
    (tmp_path / "disk").mkdir()
    assert start(tmp_path / "run").checkpoint is None
    write(tmp_path / "run", 3)
    assert start(tmp_path / "run").checkpoint == checkpoint_folder(tmp_path / "run", 3)


def test_to_resume_from_something_else_than_a_checkpoint_is_refused_with_what_it_is(tmp_path):
    own = write(tmp_path / "run", 3)
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints"):
        with pytest.raises(ConfigError, match=f"has 1 checkpoint; wanted one of them; fix: --resume {own}"):
            start(tmp_path / "new", str(path))
    with pytest.raises(ConfigError, match=f"{Path.home()}/no-such-run does not exist"):
        start(tmp_path / "new", "~/no-such-run")
    with pytest.raises(ConfigError, match="step-00000009 does not exist"):
        start(tmp_path / "new", str(own.with_name("step-00000009")))
    with pytest.raises(ConfigError, match="model.safetensors is a file; wanted the folder of a checkpoint"):
        start(tmp_path / "new", str(own / "model.safetensors"))
    damage(own)
    with pytest.raises(RunError, match=f"model.safetensors does not match.*verify {tmp_path / 'run'}"):
        start(tmp_path / "new", str(own))


def test_an_earlier_outcome_is_not_that_of_an_attempt_that_is_killed(tmp_path):
    write(tmp_path, 1)
    write_outcome(tmp_path, {"exit_code": 0, "reason": "done"})
    with pytest.raises(ConfigError):  # refused: the run has still ended so
        start(tmp_path, cfg=TrainConfig(classes=3))
    assert read_outcome(tmp_path)["exit_code"] == 0
    start(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_outcome(tmp_path)


def test_runs_that_start_in_one_second_get_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda *_: "20260102-030405")
    found = [start(None).run_dir for _ in range(3)]
    names = [f"alexnet-owt-20260102-030405{more}" for more in ("", "-2", "-3")]
    assert found == [tmp_path / "runs" / name for name in names]


def test_a_folder_in_use_is_refused_before_anything_in_it_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "WATCH_S", 0.1)
    start(tmp_path)
    (tmp_path / "config.json").write_text("theirs")
    with Ownership() as theirs:
        theirs.take(tmp_path)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
        process = multiprocessing.get_context("fork").Process(target=refused, args=(tmp_path,))
        process.start()
        process.join(20)
        assert process.exitcode == 2
        assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (tmp_path / "config.json").read_text() == "theirs"


def refused(run_dir):
    try:
        start(run_dir)
    except ConfigError as error:
        os._exit(error.exit_code if "is in use by process" in error.saw else 9)


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Not a directory.*--run-dir ELSEWHERE"):
        start(tmp_path / "file" / "run")
    (tmp_path / "run" / "config.json").mkdir(parents=True)
    with pytest.raises(ConfigError, match="Is a directory"):
        start(tmp_path / "run")
