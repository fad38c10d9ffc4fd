"""Ranks that share the first GPU train on random images; rank 0 writes the weights and the time of a sum.

usage: shared_gpu.py OUT SETTINGS [STEPS]     SETTINGS is a JSON object of configuration keys
"""

import json
import sys
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from safetensors.torch import save_file

from horovod_owt.config import TrainConfig
from horovod_owt.data.batch import Batch
from horovod_owt.parallel import runtime
from horovod_owt.parallel.collectives import explain_lost_ranks, sum_over_ranks
from horovod_owt.parallel.device import claim_device
from horovod_owt.runs.records import Start
from horovod_owt.topology import rank_topology
from horovod_owt.train.replica import MOMENTUM, Replica
from horovod_owt.train.watch import watched

out, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
steps = int(sys.argv[3]) if sys.argv[3:] else 3
cfg = TrainConfig(**dict(classes=10, image_size=96, stall_limit_s=20, fc_group_size=1) | settings)
world = runtime.init(claim_device(rank_topology()), fc_group_size=cfg.fc_group_size, stall_limit_s=20)
images = cfg.global_batch(world.size)
with watched(world, out, start=Start(), stall_limit_s=20, record=lambda *_, **__: None) as heartbeat:
    with explain_lost_ranks(heartbeat.lost):
        replica = Replica(cfg, world)
        rows = slice(world.rank * cfg.batch, (world.rank + 1) * cfg.batch)
        for step in range(steps):
            draw = torch.Generator().manual_seed(step)
            pictures = torch.randn(images, 3, 96, 96, generator=draw)[rows].to(world.device)
            labels = torch.randint(10, (images,), generator=draw)[rows].to(world.device)
            batch = Batch(pictures, labels, labels >= 0, np.arange(cfg.batch))
            replica.train_step(lambda batch=batch: batch, consumed=step * images, lr=0.01)
            if world.is_root:
                (out / "steps").write_text(str(step + 1))
        times_ms = []
        for number in range(60):
            start = perf_counter()
            sum_over_ranks(torch.ones(64, device=world.device), f"sum.{number % 4}")
            times_ms.append(1e3 * (perf_counter() - start))
        whole = replica.strategy.gather(replica.state_tensors())
        if world.is_root:
            save_file(
                {name: t.contiguous().cpu().clone() for name, t in whole.items() if MOMENTUM not in name},
                out / "weights.safetensors",
            )
            (out / "sum_ms.json").write_text(json.dumps(sorted(times_ms[10:])))
runtime.shutdown()
