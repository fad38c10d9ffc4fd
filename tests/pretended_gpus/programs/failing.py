"""Three operations at a time until one fails; each rank says what it saw, how long it took, and how it left.

usage: failing.py OUT      writes OUT/RANK.json; OPERATION is one of START (allreduce)
"""

import json
import os
import sys
import time
from pathlib import Path

import horovod.torch as hvd
import torch

out = Path(sys.argv[1])
torch.cuda.set_device(int(os.environ.get("DEVICE", os.environ["HOROVOD_LOCAL_RANK"])))
hvd.init()
(out / f"{hvd.rank()}.pid").write_text(str(os.getpid()))
values = torch.ones(1000).cuda()
seen, start = {"error": None}, time.monotonic()
rank = hvd.rank()
START = {
    "allreduce": lambda name: hvd.allreduce_async_(values, op=hvd.Sum, name=name),
    "allgather": lambda name: hvd.allgather_async(values, name=name),
    "alltoall": lambda name: hvd.alltoall_async(values, name=name),
    "broadcast": lambda name: hvd.broadcast_async_(values, root_rank=0, name=name),
}
operation = START[os.environ.get("OPERATION", "allreduce")]
try:
    for _ in range(50):
        start = time.monotonic()
        handles = [operation(f"values.{i}") for i in range(3)]
        for handle in handles:
            hvd.synchronize(handle)
except Exception as error:
    seen = {"error": f"{type(error).__name__}: {error}", "after_s": time.monotonic() - start}
    for handle in handles:  # none of them may wait for ever
        try:
            hvd.synchronize(handle)
        except Exception:
            pass
start = time.monotonic()
hvd.shutdown()
seen["shutdown_s"] = time.monotonic() - start
(out / f"{rank}.json").write_text(json.dumps(seen))
