"""Checkpoints of a net with one matrix."""

import torch

from horovod_owt.train.checkpoint import Checkpoint


def checkpoint(step: int) -> Checkpoint:
    values = torch.arange(6.0).view(2, 3) + step
    state = {"step": step, "samples_consumed": 32 * step, "num_samples": 96}
    return Checkpoint({"w": values}, {"momentum.w": -values}, state)
