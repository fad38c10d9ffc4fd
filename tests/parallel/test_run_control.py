"""A real run controlled by files in its folder, with a hook; and one that is killed three times, measured."""

import json
import os
import subprocess
import time

import psutil
import pytest
from real_ranks import NARROW, OWT, SMALL, outcome, records, settings, steps_done, wait_for

from horovod_owt.runs.checkpoints import list_checkpoints
from horovod_owt.runs.goodput import goodput

HOOK = """#!/bin/sh
echo "$@" >>"$2/events"
exit 3
"""


def owt(*words) -> str:
    done = subprocess.run([*OWT, *map(str, words)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_run_saves_and_stops_when_asked_by_files(start, images, tmp_path):
    run_dir, hook = tmp_path / "run", tmp_path / "hook"
    hook.write_text(HOOK)
    hook.chmod(0o755)
    more = settings(epochs=1000, keep_checkpoints=1000, hook=hook)
    job = start([*NARROW, "train", images, *SMALL, "--run-dir", run_dir, *more, "--log-format", "json"])
    wait_for(lambda: steps_done(run_dir) >= 2)

    folder = owt("save", run_dir, "--wait")
    saved = int(folder[-8:])
    assert saved >= 2 and list_checkpoints(run_dir) and not (run_dir / "SAVE").exists()
    wait_for(lambda: steps_done(run_dir) > saved + 1)  # it goes on

    asked = time.monotonic()
    reason = owt("stop", run_dir, "--wait")
    assert "stopped by the file STOP after step " in reason
    done = job.finish()
    assert done.exit_code != 0 and time.monotonic() - asked < 60
    end = outcome(run_dir)
    assert (end["exit_code"], end["stopped_by"]) == (75, "STOP") and end["reason"] == reason
    assert int(list_checkpoints(run_dir)[0].name[5:]) == end["step"] == records(run_dir, "step")[-1]["step"]
    assert not (run_dir / "STOP").exists()

    events = (run_dir / "events").read_text().splitlines()
    assert events[-1] == f"end {run_dir}" and set(events[:-1]) == {f"checkpoint {run_dir}"}
    lines = [json.loads(line[line.index("{") :]) for line in done.stderr.splitlines() if '"level"' in line]
    assert any("STOP: stopping at a checkpoint" in line["message"] for line in lines)
    assert any("hook" in line["message"] and "exit code 3" in line["message"] for line in lines)
    logs = sorted((run_dir / "logs" / "attempt-0001").iterdir())
    assert [file.name for file in logs] == ["rank-0000.log", "rank-0001.log"]
    for rank, file in enumerate(logs):
        first, *_, last = map(json.loads, file.read_text().splitlines())
        assert f"rank {rank} of 2" in first["message"] and "stopped by the file STOP" in last["message"]


@pytest.mark.slow
def test_goodput_after_kills_is_that_of_the_clock_outside(start, images, tmp_path):
    """One kill; OWT_TEST_KILLS=3 for more."""
    kills, run_dir = int(os.environ.get("OWT_TEST_KILLS", 1)), tmp_path / "run"
    last_step = 20 * (kills + 1)
    command = [*NARROW, "train", images, *SMALL, "--run-dir", run_dir]
    command += settings(checkpoint_every=10, max_steps=last_step, epochs=1000)
    began, killed = [], []
    for goal in range(16, last_step - 10, 20):
        job = start(command, launcher="none")
        began.append(psutil.Process(job.process.pid).create_time())
        wait_for(lambda goal=goal: steps_done(run_dir) and records(run_dir, "step")[-1]["step"] >= goal)
        job.kill()
        killed.append(time.time())
        job.process.wait()
        time.sleep(2)  # in the queue
    job = start(command, launcher="none")
    began.append(psutil.Process(job.process.pid).create_time())
    assert job.finish().exit_code == 0

    found, steps = goodput(run_dir), records(run_dir, "step")
    newest = {step["step"]: step for step in steps}  # of each number the last: the one that counted
    assert found.steps == len(newest) == last_step and found.steps_lost == len(steps) - last_step > 0
    assert found.attempts == kills + 1
    ended = (run_dir / "outcome.json").stat().st_mtime
    wall_s = ended - began[0]
    assert found.wall_s == pytest.approx(wall_s, rel=0.01)
    assert found.share * found.wall_s == pytest.approx(
        sum(step["step_ms"] for step in newest.values()) / 1e3, abs=0.01 * wall_s
    )
    queue_s = sum(start - end for start, end in zip(began[1:], killed, strict=True))
    assert found.seconds["queue"] == pytest.approx(queue_s, abs=0.02 * wall_s)
    print(json.dumps({**found.to_dict(), "outside": {"wall_s": wall_s, "queue_s": queue_s}}))
