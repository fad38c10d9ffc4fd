"""Runs that are stopped, or stop themselves."""

import signal

import pytest
from real_ranks import NARROW, PROGRAMS, SMALL, steps_done


@pytest.mark.parametrize("launcher", ["horovodrun", pytest.param("mpirun", marks=pytest.mark.slow)])
def test_a_bug_on_one_rank_ends_all_with_its_traceback(run, images, tmp_path, launcher):
    command = ["python", PROGRAMS / "bug.py", "train", images, "--run-dir", tmp_path, *SMALL]
    done = run(command, launcher=launcher, exit_code=None, limit_s=60)
    said = done.stdout + done.stderr
    assert done.exit_code != 0
    assert "owt: [rank 1 " in said and "ZeroDivisionError: planted" in said
    assert steps_done(tmp_path) == 1


@pytest.mark.slow
def test_a_benchmark_that_is_ended_reports_what_was_done(start):
    words = ["bench", "boston", "--batches", 100_000, "--set", "image_size=64", "--json"]
    job = start([*NARROW, *words], launcher="none")
    for line in job.process.stderr:
        if "/100000]  Time" in line:  # a mini-batch is done
            break
    job.process.send_signal(signal.SIGINT)
    done = job.finish(limit_s=60)
    assert done.exit_code == 130, done.stderr
    report = done.json()
    assert 1 <= report["batches"] < 100_000 and report["s_per_batch"]["median"] > 0
