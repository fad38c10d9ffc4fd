"""Training steps without a data set, on any device."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from horovod_owt.config import TrainConfig
from horovod_owt.data.batch import Batch
from horovod_owt.parallel.runtime import World
from horovod_owt.train.replica import MOMENTUM, Replica

CONFIG = TrainConfig(classes=10, image_size=96, batch=16, fc_group_size=1)


def alone(device: torch.device) -> World:
    return World(0, 1, 0, 1, "here", device, torch.get_num_threads())


def make_replica(device: torch.device, **settings) -> Replica:
    return Replica(replace(CONFIG, **settings), alone(device))


def random_batch(cfg: TrainConfig, device: torch.device, seed: int) -> Batch:
    """The same numbers on every device."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(cfg.batch, 3, cfg.image_size, cfg.image_size, generator=draw)
    labels = torch.randint(cfg.classes, (cfg.batch,), generator=draw)
    images = images.contiguous(memory_format=torch.channels_last).to(device)
    return Batch(
        images, labels.to(device), torch.ones_like(labels, dtype=torch.bool).to(device), np.arange(cfg.batch)
    )


def train(replica: Replica, steps: int, lr: float = 0.01) -> list[float]:
    """The losses."""
    cfg, losses = replica.cfg, []
    for step in range(steps):
        batch = random_batch(cfg, replica.world.device, step)
        losses.append(replica.train_step(lambda batch=batch: batch, consumed=step * cfg.batch, lr=lr).loss)
    return losses


def weights(replica: Replica) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor, _ in replica.state_tensors()}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative to the largest number of each tensor."""
    return max(
        (
            (a[name].double() - b[name].double()).abs().max() / a[name].double().abs().max().clamp(min=1e-12)
        ).item()
        for name in a
    )


def update_difference(before: dict[str, Tensor], a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Norm of the difference of two trainings, relative to what they have changed: of all weights together.

    Not tensor by tensor: an activation close to zero may be positive on one device only, which changes
    whole rows of a gradient; and before a batch normalisation the gradient of a bias is rounding alone.
    """
    names = [name for name in before if MOMENTUM not in name]
    changed, differs = (
        sum((one[name].double() - other[name].double()).square().sum().item() for name in names)
        for one, other in ((a, before), (a, b))
    )
    return (differs / changed) ** 0.5
