"""One rank's copy of the net with its optimizer: a training step, and its state as tensors by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from horovod_owt.config import TrainConfig
from horovod_owt.data.hashing import hashed
from horovod_owt.data.pipeline import Batch
from horovod_owt.model import build_model
from horovod_owt.parallel.collectives import SumInBackground
from horovod_owt.parallel.data_parallel import DataParallel
from horovod_owt.parallel.runtime import World

_DROPOUT = 2  # keeps these draws apart from the order's and the augmentation's

AUTOCAST_DTYPE = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepReport:
    """What one optimizer update did, the same on every rank but for the times."""

    loss: float  # mean over the global batch
    stop_asked: bool  # by any rank
    step_s: float
    data_wait_s: float
    exposed_comm_s: float


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The precision of forward passes; weights and gradients stay fp32."""
    dtype = AUTOCAST_DTYPE[precision]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


class Replica:
    """Model, strategy and optimizer of this rank."""

    def __init__(self, cfg: TrainConfig, world: World) -> None:
        self.cfg, self.world = cfg, world
        torch.use_deterministic_algorithms(cfg.deterministic, warn_only=True)
        torch.backends.cudnn.benchmark = not cfg.deterministic  # one image size: let cuDNN choose once
        model = build_model(cfg.model, cfg.classes, dropout=cfg.dropout, seed=cfg.seed).to(world.device)
        self.model = model.to(memory_format=torch.channels_last) if cfg.channels_last else model
        self.strategy = DataParallel(
            self.model, world, accum_steps=cfg.accum_steps, compression=cfg.compression
        )
        self.optimizer = _build_optimizer(self.model, cfg)
        self._scaler = _build_scaler() if cfg.precision == "fp16" else None

    def train_step(
        self, next_batch: Callable[[], Batch], *, step: int, lr: float, stop: bool = False
    ) -> StepReport:
        """One optimizer update over `accum_steps` micro-batches; `stop` asks all ranks to stop after it.

        Raises FloatingPointError on every rank, before the update, when the loss is NaN or infinite on any.
        """
        start = perf_counter()
        cfg, data_wait_s = self.cfg, 0.0
        self.model.train()
        # Dropout is a function of (seed, step, rank): a resumed run draws what the unbroken one would.
        torch.manual_seed(int(hashed(_DROPOUT, cfg.seed, step, self.world.rank)[0] >> np.uint64(1)))
        self.strategy.zero_grad()
        loss_sum = torch.zeros((), device=self.world.device)
        for micro_step in range(cfg.accum_steps):
            asked = perf_counter()
            batch = next_batch()
            data_wait_s += perf_counter() - asked
            with self.autocast():
                logits = self.model(batch.images)
            loss = self.strategy.scale(
                F.cross_entropy(logits.float(), batch.labels, label_smoothing=cfg.label_smoothing)
            )
            loss_sum += loss.detach()
            if micro_step == cfg.accum_steps - 1:
                facts = torch.stack([loss_sum, loss_sum.new_tensor(float(stop))])
                shared = SumInBackground(facts, name="step_facts")
                self.strategy.begin_last_backward()
            (self._scaler.scale(loss) if self._scaler else loss).backward()
        exposed_comm_s = self.strategy.finish()
        mean_loss, stops = shared.result().tolist()
        if not math.isfinite(mean_loss):
            raise FloatingPointError(f"loss is {mean_loss}")
        self._update(lr)
        return StepReport(mean_loss, stops > 0, perf_counter() - start, data_wait_s, exposed_comm_s)

    def autocast(self) -> torch.autocast:
        return autocast(self.cfg.precision, self.world.device)

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The live tensors of model and optimizer by name: copy them to keep, write into them to restore."""
        named = dict(self.model.named_parameters())
        momentum = {
            f"momentum.{name}": self.optimizer.state[p]["momentum_buffer"] for name, p in named.items()
        }
        return {name: tensor.detach() for name, tensor in self.model.state_dict().items()}, momentum

    def scaler_state(self) -> dict[str, float]:
        """The loss scale of fp16, in plain numbers; nothing for the other precisions."""
        return self._scaler.state_dict() if self._scaler else {}

    def load_scaler_state(self, state: dict[str, float]) -> None:
        if self._scaler and state:
            self._scaler.load_state_dict(state)

    def _update(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self._scaler:
            self._scaler.step(self.optimizer)  # unscales, and skips the update if a gradient overflowed
            self._scaler.update()
        else:
            self.optimizer.step()


def _build_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.SGD:
    """SGD with momentum, fused where torch has it: one pass over the weights, 24 not 147 ms on a CPU."""
    fused = "fused" in inspect.signature(torch.optim.SGD).parameters
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=cfg.lr,
        momentum=cfg.momentum,
        weight_decay=cfg.weight_decay,
        **({"fused": True} if fused else {}),
    )
    for parameter in model.parameters():  # from the start, so that every checkpoint has the same tensors
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _build_scaler():
    """torch.amp's scaler, or its older name in torch 2.0."""
    return torch.amp.GradScaler("cuda") if hasattr(torch.amp, "GradScaler") else torch.cuda.amp.GradScaler()
