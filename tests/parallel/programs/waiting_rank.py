"""Rank 0 computes for half a second while rank 1 waits for it in MPI on the same core: CPU time of both."""

import json
import os
import time

from horovod_owt.parallel import runtime
from horovod_owt.parallel.device import CPU

world = runtime.init(CPU)
os.sched_setaffinity(0, {min(os.sched_getaffinity(os.getppid()))})

from mpi4py import MPI  # noqa: E402  its own start of MPI would be too early

everyone = MPI.COMM_WORLD
everyone.Barrier()
start = time.process_time()
while world.is_root and time.process_time() - start < 0.5:
    pass
everyone.Bcast(bytearray(8))
cpu_s = everyone.gather(time.process_time() - start)
if world.is_root:
    print(json.dumps({"computing_s": cpu_s[0], "waiting_s": cpu_s[1]}), flush=True)
runtime.shutdown()
