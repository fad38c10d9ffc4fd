"""`owt`, where rank 1 meets a picture of NaN in its third step."""

from narrow import main

from horovod_owt.topology import read_topology
from horovod_owt.train.replica import Replica

train_step = Replica.train_step


def struck(self, next_batch, *, consumed, **more):
    def poisoned():
        batch = next_batch()
        if consumed == 2 * 8 and read_topology().rank == 1:
            batch.images[0] = float("nan")
        return batch

    return train_step(self, poisoned, consumed=consumed, **more)


Replica.train_step = struck
main()
