"""Signals as a terminal has them, and cores and time for tests that run side by side."""

import os
import signal

from hypothesis import settings

# A job in a shell's background inherits an ignored SIGINT, and nohup's child an ignored SIGHUP.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several processes would wait for each other's cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("owt", deadline=None)  # an example may wait for a core, or for torch to load
settings.load_profile("owt")
