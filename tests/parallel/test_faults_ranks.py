"""Ranks that die or stand still: who it was is said, nothing stays behind, and a supervisor starts again."""

import signal
import time

import psutil
import pytest
from real_ranks import NARROW, SMALL, VENV_BIN, outcome, ranks_below, records, settings, steps_done, wait_for

SUPERVISE = [VENV_BIN / "owt", "launch", "supervise"]
HOROVODRUN = ["horovodrun", "--gloo", "-np", "2"]
GONE_WITHIN_S = 30


def family(job) -> list[psutil.Process]:
    """The launcher and every process below it, whatever group or session that made."""
    launcher = psutil.Process(job.process.pid)
    return [launcher, *launcher.children(recursive=True)]


def end_within(job, processes: list[psutil.Process], limit_s: float):
    """The job's last words, once none of its processes is left; fails if that takes longer than `limit_s`."""
    end = time.monotonic() + limit_s
    done = job.finish(limit_s)
    _, left = psutil.wait_procs(processes, timeout=max(0.1, end - time.monotonic()))
    assert not left
    return done


@pytest.mark.parametrize(
    ("launcher", "parallel", "victim"),
    [
        ("horovodrun", "data", 0),
        pytest.param("horovodrun", "hybrid", 1, marks=pytest.mark.slow),
        pytest.param("mpirun", "data", 1, marks=pytest.mark.slow),
        ("torchrun", "data", 0),
    ],
)
def test_a_killed_rank_ends_all_and_is_named(start, images, tmp_path, launcher, parallel, victim):
    """Its peers wait in a sum of gradients, or in a gather of features."""
    command = [*NARROW, "train", images, "--run-dir", tmp_path, *SMALL, "--parallel", parallel]
    job = start(command, launcher=launcher)
    wait_for(lambda: steps_done(tmp_path) >= 2)
    everyone = family(job)
    ranks_below(job.process.pid)[victim].kill()
    done = end_within(job, everyone, GONE_WITHIN_S)
    said = done.stdout + done.stderr
    host = records(tmp_path, "run")[0]["hosts"][victim]
    # that of the first rank that failed; torchrun knows one for all failures
    assert done.exit_code == (1 if launcher == "torchrun" else 128 + signal.SIGKILL)
    assert f"lost rank {victim} on {host}: " in said
    by = {"horovodrun": "Exit code: 137", "mpirun": "signal 9", "torchrun": "SIGKILL"}
    assert by[launcher] in said
    assert outcome(tmp_path)["exit_code"] == 1
    assert outcome(tmp_path)["reason"].startswith(f"lost contact with rank {victim} on {host}")


@pytest.mark.parametrize(
    ("launcher", "victim"), [("horovodrun", 0), pytest.param("mpirun", 1, marks=pytest.mark.slow)]
)
def test_a_stopped_rank_is_reported_and_ended_with_the_job(start, images, tmp_path, launcher, victim):
    """SIGQUIT before it dumps the stacks of a rank that goes on."""
    stall_limit_s = 6
    command = [*NARROW, "train", images, "--run-dir", tmp_path, *SMALL]
    job = start([*command, *settings(stall_limit_s=stall_limit_s)], launcher=launcher)
    wait_for(lambda: steps_done(tmp_path) >= 2)
    ranks, stacks = ranks_below(job.process.pid), tmp_path / "stacks"
    ranks[victim].send_signal(signal.SIGQUIT)
    wait_for(lambda: "train_step" in (stacks / f"rank-000{victim}.txt").read_text())
    before = steps_done(tmp_path)
    wait_for(lambda: steps_done(tmp_path) > before)

    everyone = family(job)
    ranks[victim].send_signal(signal.SIGSTOP)
    done = end_within(job, everyone, stall_limit_s + GONE_WITHIN_S)
    said = done.stdout + done.stderr
    who = f"rank {victim} on {records(tmp_path, 'run')[0]['hosts'][victim]} has been silent"
    assert done.exit_code == 1
    (report,) = [line for line in said.splitlines() if f"stalled: {who}" in line and "WARNING" in line]
    assert f"rank {1 - victim} wait" in report and " in '" in report
    assert outcome(tmp_path)["exit_code"] == 1
    reason = outcome(tmp_path)["reason"]
    assert reason.startswith(f"stalled: {who}") and "the same command" in reason
    assert "synchronize" in (stacks / f"rank-000{1 - victim}.txt").read_text()


def test_a_supervised_job_resumes_from_its_checkpoint_after_a_kill(start, images, tmp_path):
    command = [*NARROW, "train", images, "--run-dir", tmp_path, *SMALL]
    command += settings(max_steps=12, checkpoint_every=2)
    job = start([*SUPERVISE, "--", *HOROVODRUN, *command], launcher="none")
    wait_for(lambda: len(list(tmp_path.glob("checkpoints/step-????????"))) >= 1)
    ranks_below(job.process.pid)[1].kill()
    done = job.finish()
    assert done.exit_code == 0 and outcome(tmp_path)["reason"] == "done", done.stderr[-3000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("supervise: start 2")]
    (first, second), steps = records(tmp_path, "run"), [r["step"] for r in records(tmp_path, "step")]
    resumed_at = second["first_step"]
    assert first["first_step"] == 0 < resumed_at and f"step-{resumed_at:08d}" in line
    assert steps[-(12 - resumed_at) :] == list(range(resumed_at + 1, 13))
    assert steps[:resumed_at] == list(range(1, resumed_at + 1))


def test_a_launched_job_stops_at_a_checkpoint_on_a_signal_and_is_not_restarted(
    start, images, tmp_path, narrow_owt
):
    options = ["--ranks", "2", "--max-restarts", "3", "--", images, "--run-dir", tmp_path, *SMALL]
    job = start([VENV_BIN / "owt", "launch", "local", *options], launcher="none", **narrow_owt)
    wait_for(lambda: steps_done(tmp_path) >= 2)
    everyone = family(job)
    job.process.send_signal(signal.SIGTERM)
    done = end_within(job, everyone, GONE_WITHIN_S)
    assert done.exit_code == outcome(tmp_path)["exit_code"] == 75
    assert (tmp_path / "checkpoints" / f"step-{outcome(tmp_path)['step']:08d}").is_dir()
    assert len(records(tmp_path, "run")) == 1 and "start 2" not in done.stderr


def test_a_supervised_job_with_a_bad_configuration_is_not_started_again(start, images, tmp_path):
    command = [*NARROW, "train", images, "--run-dir", tmp_path / "run", *settings(no_such_key=1)]
    job = start([*SUPERVISE, "--", *HOROVODRUN, *command], launcher="none")
    done = job.finish(60)
    assert done.exit_code == 2
    (line,) = [line for line in done.stderr.splitlines() if "not restarted: " in line]
    assert line.startswith("supervise: exit code 2, not restarted: ") and "start 2" not in done.stderr
