"""Train on random images that are a function of the step; rank 0 saves whole weights and prints the losses.

usage: train_random.py OUT STEPS HIDDEN [key=value ...]
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from horovod_owt.config import resolve
from horovod_owt.data.pipeline import Batch
from horovod_owt.model import alexnet_owt
from horovod_owt.parallel import runtime
from horovod_owt.topology import read_topology, resolve_group_size
from horovod_owt.train.replica import MOMENTUM, Replica

SIDE = 63  # px, the smallest


def global_batch(step: int, images: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same on every rank and in the plain program."""
    generator = torch.Generator().manual_seed(1000 + step)
    pictures = torch.randn(images, 3, SIDE, SIDE, generator=generator)
    return pictures, torch.randint(classes, (images,), generator=generator)


def main() -> None:
    out, steps, hidden, *settings = sys.argv[1:]
    alexnet_owt.HIDDEN = int(hidden)
    # the rate is that of the global batch, whatever the number of ranks
    cfg = resolve(str(Path(__file__).parents[1] / "small.yaml"), ["classes=10", "image_size=63", *settings])
    size = resolve_group_size(cfg.fc_group_size, read_topology())
    world = runtime.init("cpu", fc_group_size=size)
    cfg = resolve(None, [f"{k}={v}" for k, v in (cfg.to_dict() | {"fc_group_size": size}).items()])
    replica = Replica(cfg, world)
    images, losses, traffic = cfg.global_batch(world.size), [], {}
    for step in range(int(steps)):
        pictures, labels = global_batch(step, images, cfg.classes)

        def micro_batches(pictures=pictures, labels=labels):
            for start in range(world.rank * cfg.rank_batch(), (world.rank + 1) * cfg.rank_batch(), cfg.batch):
                rows = slice(start, start + cfg.batch)
                valid = torch.ones(cfg.batch, dtype=torch.bool)
                yield Batch(pictures[rows], labels[rows], valid, np.arange(start, start + cfg.batch))

        report = replica.train_step(micro_batches().__next__, consumed=step * images, lr=cfg.lr)
        losses.append(report.loss)
        traffic = {"sent": report.bytes_sent, "received": report.bytes_received}
    replica.strategy.average_running_statistics()
    whole = {name: tensor.contiguous().clone() for name, tensor in replica.gather().items()}
    if world.is_root:
        save_file({n: t for n, t in whole.items() if not n.startswith(MOMENTUM)}, out)
        print(json.dumps({"losses": losses, "traffic": traffic}), flush=True)
    runtime.shutdown()


if __name__ == "__main__":
    main()
