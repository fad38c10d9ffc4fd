"""`owt` with a bug that strikes rank 1 in its second step."""

from narrow import main

from horovod_owt.topology import read_topology
from horovod_owt.train.replica import Replica

train_step = Replica.train_step


def struck(self, next_batch, *, consumed, **more):
    if consumed > 0 and read_topology().rank == 1:
        raise ZeroDivisionError("planted")
    return train_step(self, next_batch, consumed=consumed, **more)


Replica.train_step = struck
main()
