"""owt preflight whose rank 1 hangs when it is asked for OWT_TEST_DEAF_TO."""

import os
import signal

from horovod_owt.cli import main
from horovod_owt.preflight.probes import Probes
from horovod_owt.topology import read_topology

gather = Probes.gather


def gather_or_stop(probes, what, *words, **options):
    if what == os.environ["OWT_TEST_DEAF_TO"] and read_topology().rank == 1:
        signal.raise_signal(signal.SIGSTOP)  # in this thread, at once
    return gather(probes, what, *words, **options)


Probes.gather = gather_or_stop
main()
