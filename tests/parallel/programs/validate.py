"""Score a narrow net with fixed weights over the ranks' slices; rank 0 prints the counts."""

import json
import sys
from pathlib import Path

import narrow  # noqa: F401

from horovod_owt.config import resolve
from horovod_owt.data.store import open_data_set
from horovod_owt.parallel import runtime
from horovod_owt.parallel.device import CPU
from horovod_owt.train.evaluate import validate
from horovod_owt.train.pipelines import validation_pipeline
from horovod_owt.train.replica import Replica

cfg = resolve(str(Path(__file__).parents[1] / "small.yaml"), ["classes=8", "seed=2"])
world = runtime.init(CPU)
with validation_pipeline(cfg, open_data_set(Path(sys.argv[1])).val, world) as batches:
    score = validate(Replica(cfg, world), batches)
if world.is_root:
    of_classes = {"class_images": score.class_images, "class_correct": score.class_correct}
    print(json.dumps({**score.to_dict(), **of_classes}), flush=True)
runtime.shutdown()
