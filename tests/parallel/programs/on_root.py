"""Rank 0 fails at something that it does for all: every rank must learn of it."""

import json
import sys

from horovod_owt.errors import ConfigError
from horovod_owt.parallel import runtime
from horovod_owt.parallel.collectives import gather_objects, on_root
from horovod_owt.parallel.device import CPU


def fail():
    raise ConfigError("seen", wanted="wanted", fix="fix")


world = runtime.init(CPU)
assert on_root(lambda: world.rank + 41, "fine") == 41
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
