"""Three allreduces at a time until one fails; each rank says what it saw, how long it took, and how it left.

usage: failing.py OUT      writes OUT/RANK.json
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
try:
    for _ in range(50):
        start = time.monotonic()
        handles = [hvd.allreduce_async_(values, op=hvd.Sum, name=f"values.{i}") for i in range(3)]
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
