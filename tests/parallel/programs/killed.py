"""narrow.py whose rank RANK is killed, SECONDS after STEP began: OWT_TEST_KILL="RANK STEP SECONDS"."""

import os
import signal
import threading

from narrow import main

from horovod_owt.topology import read_topology
from horovod_owt.train.replica import Replica

train_step = Replica.train_step
rank, step, seconds = os.environ["OWT_TEST_KILL"].split()


def struck(self, next_batch, *, consumed, **more):
    done = consumed // self.cfg.global_batch(self.world.size)
    if read_topology().rank == int(rank) and done + 1 == int(step):
        threading.Timer(float(seconds), signal.raise_signal, [signal.SIGKILL]).start()
    return train_step(self, next_batch, consumed=consumed, **more)


Replica.train_step = struck
main()
