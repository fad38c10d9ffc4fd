"""`owt`, where a signal reaches rank 1 in the midst of its first validation."""

import signal

from narrow import main

from horovod_owt.topology import read_topology
from horovod_owt.train import evaluate

count = evaluate._count


def struck(logits, batch):
    if read_topology().rank == 1:
        signal.raise_signal(signal.SIGTERM)  # in this thread, at once
    return count(logits, batch)


evaluate._count = struck
main()
