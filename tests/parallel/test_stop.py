"""Runs that are stopped, or stop themselves."""

import json
import os
import signal
import time

import psutil
import pytest
from conftest import OWT, PROGRAMS, SMALL, records


def wait_for(condition, limit_s=120):
    """Poll until `condition` gives something true, and return that."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    pytest.fail(f"waited {limit_s} s in vain")


def steps_done(run_dir) -> int:
    return len(records(run_dir, "step")) if (run_dir / "metrics.jsonl").exists() else 0


def ranks_below(pid: int) -> dict[int, psutil.Process]:
    """The ranks of a job under horovodrun, by rank."""
    found = {}
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if "train" in process.cmdline() and "horovod_owt" in process.cmdline():
                found[int(process.environ()["HOROVOD_RANK"])] = process
        except (psutil.NoSuchProcess, psutil.ZombieProcess, KeyError):
            continue
    return found


def test_a_signal_to_any_rank_ends_all_after_a_checkpoint(start, images, tmp_path):
    job = start([*OWT, "train", images, "--run-dir", tmp_path, *SMALL])
    wait_for(lambda: steps_done(tmp_path) >= 2)
    ranks_below(job.process.pid)[1].send_signal(signal.SIGUSR1)
    job.finish()
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert outcome["exit_code"] == 75 and "checkpoint written" in outcome["reason"]
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{outcome['step']:08d}"
    assert steps_done(tmp_path) == outcome["step"]


def test_ctrl_c_on_one_rank_alone_writes_a_checkpoint_and_the_next_run_goes_on(start, run, images, tmp_path):
    command = [*OWT, "train", images, "--run-dir", tmp_path, *SMALL]
    job = start(command, launcher="none")
    wait_for(lambda: steps_done(tmp_path) >= 1)
    os.kill(job.process.pid, signal.SIGINT)
    done = job.finish()
    assert done.exit_code == 75 and "stopped by SIGINT" in done.stderr
    stopped_at = steps_done(tmp_path)
    run([*command, "--set", f"max_steps={stopped_at + 1}"], launcher="none")
    assert [r["step"] for r in records(tmp_path, "step")] == list(range(1, stopped_at + 2))


@pytest.mark.parametrize("parallel", ["data", "hybrid"])
def test_a_killed_rank_ends_the_job_and_the_record_says_so(start, images, tmp_path, parallel):
    """Its peers wait in a sum of gradients, or in a gather of features."""
    job = start([*OWT, "train", images, "--run-dir", tmp_path, *SMALL, "--parallel", parallel])
    wait_for(lambda: steps_done(tmp_path) >= 2)
    ranks_below(job.process.pid)[1].kill()
    done = job.finish(limit_s=30)
    assert done.exit_code != 0
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert outcome["exit_code"] == 1 and outcome["reason"].startswith("lost contact with another rank")


def test_a_loss_that_is_no_number_ends_all_ranks_with_step_and_images(run, images, tmp_path):
    command = [
        *OWT,
        "train",
        images,
        "--run-dir",
        tmp_path,
        *SMALL,
        "--set",
        "lr=1e9",
        "--set",
        "warmup_epochs=0",
    ]
    done = run(command, exit_code=None)
    assert done.exit_code != 0
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert outcome["exit_code"] == 1
    assert outcome["reason"].startswith("loss is ") and f"at step {outcome['step'] + 1}" in outcome["reason"]
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("launcher", ["horovodrun", "mpirun"])
def test_a_bug_on_one_rank_ends_all_with_its_traceback(run, images, tmp_path, launcher):
    command = ["python", PROGRAMS / "bug.py", "train", images, "--run-dir", tmp_path, *SMALL]
    done = run(command, launcher=launcher, exit_code=None, limit_s=60)
    said = done.stdout + done.stderr
    assert done.exit_code != 0
    assert "owt: [rank 1 " in said and "ZeroDivisionError: planted" in said
    assert steps_done(tmp_path) == 1
