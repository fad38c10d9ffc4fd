"""owt preflight whose rank 1 stands still when it is asked about OWT_TEST_DEAF_TO, with short limits."""

import os
import signal

from horovod_owt.cli import main
from horovod_owt.preflight import run
from horovod_owt.preflight.inquiry import Inquiry
from horovod_owt.topology import read_topology

run.LOOK_S = 2.0
ask = Inquiry.ask


def ask_or_stop(inquiry, what, *words, **options):
    if what == os.environ["OWT_TEST_DEAF_TO"] and read_topology().rank == 1:
        signal.raise_signal(signal.SIGSTOP)  # in this thread, at once
    return ask(inquiry, what, *words, **options)


Inquiry.ask = ask_or_stop
main()
