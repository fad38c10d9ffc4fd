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
DYING = """
import os

from horovod_owt.data.workers import in_processes
from horovod_owt.errors import RunError

if __name__ == "__main__":
    try:
        list(in_processes(os._exit, [9, 9, 9, 9], 2))
    except RunError as error:
        print(error)
"""
# in each worker, before anything of ours runs there
AT_START = """
import os, signal, sys
if "--multiprocessing-fork" in sys.orig_argv:
    os.kill(os.getpid(), signal.SIGINT)
"""


def run(program: str, folder) -> subprocess.CompletedProcess:
    (folder / "program.py").write_text(program)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    return subprocess.run(
        [sys.executable, folder / "program.py"], env=env, capture_output=True, text=True, timeout=50
    )


def test_ctrl_c_does_not_meet_a_worker_that_is_still_starting(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(AT_START)
    done = run(PROGRAM, tmp_path)
    assert done.stdout == "[1, 2, 3, 4]\n" and "KeyboardInterrupt" not in done.stderr, done.stderr


def test_a_process_that_dies_is_an_error_in_a_line(tmp_path):
    """The kernel ends one for want of memory: of a login node with many cores and a small limit, say."""
    done = run(DYING, tmp_path)
    assert done.stdout.startswith("a worker process died; fix: if memory is short, use fewer"), done.stderr
    assert "Traceback" not in done.stderr
