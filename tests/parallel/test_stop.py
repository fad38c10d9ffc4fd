"""Runs that are stopped, or stop themselves."""

import pytest
from real_ranks import PROGRAMS, SMALL, steps_done


@pytest.mark.parametrize("launcher", ["horovodrun", pytest.param("mpirun", marks=pytest.mark.slow)])
def test_a_bug_on_one_rank_ends_all_with_its_traceback(run, images, tmp_path, launcher):
    command = ["python", PROGRAMS / "bug.py", "train", images, "--run-dir", tmp_path, *SMALL]
    done = run(command, launcher=launcher, exit_code=None, limit_s=60)
    said = done.stdout + done.stderr
    assert done.exit_code != 0
    assert "owt: [rank 1 " in said and "ZeroDivisionError: planted" in said
    assert steps_done(tmp_path) == 1
