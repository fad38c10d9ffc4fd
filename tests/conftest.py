"""Ctrl-C as a terminal has it, and cores for tests that run side by side."""

import os
import signal

# A job in a shell's background inherits an ignored SIGINT; the tests of Ctrl-C need the ordinary one.
signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several processes would wait for each other's cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
