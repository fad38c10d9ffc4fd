"""Children of setup: what a failure says, and that none of them is left behind."""

import os
import signal
import subprocess
import sys
import time
from fcntl import LOCK_EX, flock

import pytest
from set_up_support import REPO, process


def test_a_failure_names_the_log_and_the_line_with_the_cause(tmp_path):
    log = tmp_path / "build.log"
    script = "echo compiling; echo 'x.cc:3:1: error: no such thing'; echo 'make: *** [all] Error 2'; exit 2"
    with pytest.raises(process.Failed) as stop:
        process.run("building Horovod", ["sh", "-c", script], log=log)
    assert str(stop.value) == f"building Horovod failed (exit 2): x.cc:3:1: error: no such thing; log: {log}"
    assert stop.value.exit_code == 1


def test_a_child_that_does_not_end_is_ended(tmp_path):
    start = time.monotonic()
    with pytest.raises(process.Failed, match="timed out after 1 s"):
        process.run("waiting", ["sleep", "60"], log=tmp_path / "log", timeout_s=1)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_grandchildren_too(tmp_path, signum):
    mark = f"86{os.getpid()}{signum:02}"  # a sleep of our own, to be found among the processes
    program = (
        f"import signal, sys; sys.path.insert(0, {str(REPO / 'launch')!r})\n"
        "from pathlib import Path; from steps import process\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        f"log = Path({str(tmp_path / 'log')!r})\n"
        f"process.run('build', ['sh', '-c', 'sleep {mark} & echo ready; wait'], log=log)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    try:
        log = tmp_path / "log"
        wait_for(lambda: log.exists() and "ready" in log.read_text().splitlines())
        wait_for(lambda: sleeping(mark))  # the shell is ready before its child has become `sleep`
        child.send_signal(signum)
        child.wait(20)
        wait_for(lambda: not sleeping(mark))
    finally:
        child.kill()


@pytest.mark.parametrize("ignored, ends", [(False, True), (True, False)], ids=["plain", "nohup"])
def test_the_end_of_a_terminal_ends_set_up_unless_it_is_to_be_ignored(here, tmp_path, ignored, ends):
    here.cache.mkdir(parents=True)
    handler = signal.SIG_IGN if ignored else signal.SIG_DFL
    with (here.cache / "lock").open("w") as lock:
        flock(lock, LOCK_EX)
        child = subprocess.Popen(
            [sys.executable, REPO / "launch" / "setup", "--venv", tmp_path / "venv"],
            env={"HOME": here.environ["HOME"], "PATH": here.environ["PATH"]},
            preexec_fn=lambda: signal.signal(signal.SIGHUP, handler),
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            while "another setup is using" not in (line := child.stderr.readline()):
                assert line, "it did not wait for the lock"
            child.send_signal(signal.SIGHUP)
            if ends:
                assert child.wait(20) == 130
            else:
                time.sleep(0.3)
                assert child.poll() is None
        finally:
            child.kill()
            child.wait()
            child.stderr.close()


def sleeping(mark: str) -> bool:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as words:
                if words.read() == f"sleep\0{mark}\0".encode():
                    return True
        except OSError:
            continue
    return False


def wait_for(condition, limit_s: float = 20) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
