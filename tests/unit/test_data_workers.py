import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.timeout(60)

PROGRAM = """
from horovod_owt.data.workers import in_processes

if __name__ == "__main__":
    print(sorted(in_processes(abs, [-1, -2, -3, -4], 2)))
"""
# in each worker, before anything of ours runs there
AT_START = """
import os, signal, sys
if "--multiprocessing-fork" in sys.orig_argv:
    os.kill(os.getpid(), signal.SIGINT)
"""


def test_ctrl_c_does_not_meet_a_worker_that_is_still_starting(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(AT_START)
    (tmp_path / "program.py").write_text(PROGRAM)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"], env=env, capture_output=True, text=True, timeout=50
    )
    assert done.stdout == "[1, 2, 3, 4]\n" and "KeyboardInterrupt" not in done.stderr, done.stderr
