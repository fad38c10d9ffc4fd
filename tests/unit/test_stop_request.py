"""Signals that ask a run to stop."""

import os
import signal
import subprocess
import sys

import pytest

from horovod_owt.train.stop import STOP_SIGNALS, StopRequest


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_each_is_remembered_and_its_handler_given_back(number):
    number = getattr(signal, number)
    before = {each: signal.getsignal(each) for each in STOP_SIGNALS}
    with StopRequest() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked and stop.signal == number
    assert {each: signal.getsignal(each) for each in STOP_SIGNALS} == before


def test_a_ctrl_c_after_any_of_them_ends_the_process_at_once():
    program = """
import os, signal
from horovod_owt.train.stop import StopRequest
with StopRequest():
    os.kill(os.getpid(), signal.SIGTERM)
    print("lives", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("should not be said")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGINT and done.stdout == "lives\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_the_process_was_started_to_ignore_stays_ignored(number):
    """HUP under nohup; INT where a script has `owt train ... &`, and Ctrl-C is for another command."""
    before = {each: signal.getsignal(each) for each in STOP_SIGNALS}
    signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), number)
            assert not stop.asked
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), number)
            assert stop.by == "SIGTERM"
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
