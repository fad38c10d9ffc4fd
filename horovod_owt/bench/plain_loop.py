"""A hand-written Horovod loop as in its examples: the baseline of `bench step`."""

from __future__ import annotations

from time import perf_counter

import horovod.torch as hvd
import torch
from torch.nn import functional as F
from torchvision.models import alexnet

from horovod_owt.config import TrainConfig
from horovod_owt.parallel.runtime import World
from horovod_owt.parallel.step import autocast
from horovod_owt.train.replica import StepReport


class PlainLoop:
    """torchvision's alexnet, contiguous, `hvd.DistributedOptimizer` around SGD, random tensors.

    As in Horovod's examples/pytorch, without a data loader or logging.
    """

    def __init__(self, cfg: TrainConfig, world: World) -> None:
        self._model = alexnet(weights=None, num_classes=cfg.classes, dropout=cfg.dropout).to(world.device)
        optimizer = torch.optim.SGD(
            self._model.parameters(), lr=1e-4, momentum=cfg.momentum, weight_decay=cfg.weight_decay
        )
        self._optimizer = hvd.DistributedOptimizer(
            optimizer,
            named_parameters=[(f"plain.{name}", p) for name, p in self._model.named_parameters()],
            backward_passes_per_step=cfg.accum_steps,
        )
        hvd.broadcast_parameters(self._model.state_dict(), root_rank=0)
        shape = (cfg.batch, 3, cfg.image_size, cfg.image_size)
        self._images = torch.randn(shape, device=world.device)
        self._labels = torch.randint(cfg.classes, (cfg.batch,), device=world.device)
        self._accum_steps = cfg.accum_steps
        self._autocast = lambda: autocast(cfg.precision, world.device)

    def train_step(self, step: int) -> StepReport:
        """One update; exposed communication is part of `optimizer.step` and not reported separately."""
        start = perf_counter()
        self._optimizer.zero_grad()
        for _ in range(self._accum_steps):
            with self._autocast():
                logits = self._model(self._images)
            loss = F.cross_entropy(logits.float(), self._labels) / self._accum_steps
            loss.backward()
        self._optimizer.step()
        value = loss.item()
        step_s = perf_counter() - start
        return StepReport(loss=value, stop_asked=False, step_s=step_s, data_wait_s=0.0, exposed_comm_s=0.0)
