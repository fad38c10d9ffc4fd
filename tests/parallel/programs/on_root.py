"""Rank 0 fails at something that it does for all: every rank must learn of it; and values travel."""

import json
import os
import sys
from pathlib import Path

from horovod_owt.config import TrainConfig
from horovod_owt.errors import ConfigError
from horovod_owt.parallel import runtime
from horovod_owt.parallel.collectives import broadcast_object, gather_objects, on_root
from horovod_owt.parallel.device import CPU


def fail():
    raise ConfigError("seen", wanted="wanted", fix="fix")


world = runtime.init(CPU)
assert on_root(lambda: world.rank + 41, "fine") == 41
cfg = TrainConfig(lr=0.1 + 0.2, seed=2**62)
value = (cfg, {3: (Path(os.fsdecode(b"/\xff")), b"\x00")}, "x" * (1 << 20))
last = world.size - 1
sent = broadcast_object(value if world.rank == last else None, "value", kind=TrainConfig, root_rank=last)
assert sent == value
own = {"rank": world.rank, "loss": float("nan"), "text": "y" * world.rank}
for rank, theirs in enumerate(gather_objects(own, "own")):
    assert theirs["loss"] != theirs["loss"] and (theirs["rank"], theirs["text"]) == (rank, "y" * rank)
try:
    on_root(fail, "failing")
    heard = "nothing"
except ConfigError as error:
    heard = str(error)
all_heard = gather_objects(heard, "heard")
if world.is_root:
    print(json.dumps(all_heard and {"heard": all_heard}), flush=True)
runtime.shutdown()
sys.exit(0)
