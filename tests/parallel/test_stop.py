"""Runs that are stopped, or stop themselves."""

import json

import pytest
from conftest import NARROW, PROGRAMS, SMALL, ranks_below, steps_done, wait_for


@pytest.mark.parametrize("parallel", ["data", "hybrid"])
def test_a_killed_rank_ends_the_job_and_the_record_says_so(start, images, tmp_path, parallel):
    """Its peers wait in a sum of gradients, or in a gather of features."""
    job = start([*NARROW, "train", images, "--run-dir", tmp_path, *SMALL, "--parallel", parallel])
    wait_for(lambda: steps_done(tmp_path) >= 2)
    ranks_below(job.process.pid)[1].kill()
    done = job.finish(limit_s=30)
    assert done.exit_code != 0
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert outcome["exit_code"] == 1 and outcome["reason"].startswith("lost contact with another rank")


@pytest.mark.parametrize("launcher", ["horovodrun", "mpirun"])
def test_a_bug_on_one_rank_ends_all_with_its_traceback(run, images, tmp_path, launcher):
    command = ["python", PROGRAMS / "bug.py", "train", images, "--run-dir", tmp_path, *SMALL]
    done = run(command, launcher=launcher, exit_code=None, limit_s=60)
    said = done.stdout + done.stderr
    assert done.exit_code != 0
    assert "owt: [rank 1 " in said and "ZeroDivisionError: planted" in said
    assert steps_done(tmp_path) == 1
