"""One rank's part of the net and its optimizer: a training step, and its state as whole tensors by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor, nn

from horovod_owt.config import TrainConfig
from horovod_owt.data.batch import Batch
from horovod_owt.model import build_model
from horovod_owt.parallel.activity import now
from horovod_owt.parallel.exchange import Slice
from horovod_owt.parallel.optimizer import build_optimizer
from horovod_owt.parallel.runtime import World
from horovod_owt.parallel.step import OneWeirdTrick

MOMENTUM = "momentum."  # prefix of a parameter's momentum


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """The result of one optimizer update; `loss` and `stop_asked` are the same on every rank."""

    loss: float  # mean over the good images of the global batch
    stop_asked: bool  # by any rank
    step_s: float
    data_wait_s: float
    exposed_comm_s: float
    bytes_sent: dict[str, int] = field(default_factory=dict)  # by this rank, by what they carry
    bytes_received: dict[str, int] = field(default_factory=dict)
    bad_images: int = 0  # in the global batch, not counted
    any_unnamed: bool = False  # whether a rank read a bad image that is not announced yet
    grad_norm: float | None = None  # of the whole net, before clipping; None without clip_norm


class BadBatch(Exception):
    """A global batch with bad images under bad_images=fail, or without good ones. Raised on every rank."""


class Replica:
    """Model, strategy and optimizer of this rank."""

    def __init__(self, cfg: TrainConfig, world: World) -> None:
        self.cfg, self.world = cfg, world
        if cfg.deterministic != torch.are_deterministic_algorithms_enabled():  # setting it takes seconds
            torch.use_deterministic_algorithms(cfg.deterministic, warn_only=True)
        torch.backends.cudnn.benchmark = not cfg.deterministic  # one image size: cuDNN tunes once
        model = build_model(cfg.model, cfg.classes, dropout=cfg.dropout, seed=cfg.seed).to(world.device)
        model = model.double() if cfg.precision == "fp64" else model
        model = model.to(memory_format=torch.channels_last) if cfg.channels_last else model
        self.strategy = OneWeirdTrick(model, cfg, world, update_classifier=self._update_classifier)
        conv, fc = self.strategy.conv_parameters, self.strategy.fc_parameters
        in_turns = cfg.fc_batch == "local"  # then the classifier has an optimizer of its own
        self._optimizers = [build_optimizer(p, cfg) for p in ([fc, conv] if in_turns else [fc + conv])]
        self._scaler = _build_scaler() if cfg.precision == "fp16" else None

    def train_step(
        self,
        next_batch: Callable[[], Batch],
        *,
        consumed: int,
        lr: float,
        stop: bool = False,
        named: Container[int] = (),
    ) -> StepReport:
        """One optimizer update over `accum_steps` micro-batches; `stop` asks all ranks to stop after it.

        `consumed` samples of the endless stream came before this step; `named` are the bad images already
        announced to all ranks. Raises on every rank, before the update: FloatingPointError if the loss (or
        the gradient norm, with clip_norm) is NaN or infinite on any rank, and BadBatch for a bad image under
        bad_images=fail, or if no image is good.
        """
        start, data_wait_s, strategy = perf_counter(), 0.0, self.strategy
        strategy.model.train()
        strategy.begin_step()
        self._set_lr(lr)
        one = torch.ones((), device=self.world.device)
        scale = self._scaler.scale(one) if self._scaler else one
        loss_sum = torch.zeros((), device=self.world.device)
        own_bad, own_unnamed = 0, 0
        for micro_step in range(self.cfg.accum_steps):
            last = micro_step == self.cfg.accum_steps - 1
            asked = perf_counter()
            with now.phase("reading images"):
                batch = next_batch()
            data_wait_s += perf_counter() - asked
            own_bad += len(batch.faults)
            own_unnamed += sum(index not in named for index in batch.bad_images())
            passing = strategy.convolve(batch.images, batch.labels, consumed=consumed, micro_step=micro_step)
            loss_sum += strategy.classify(passing, last=last, gradient_scale=scale)
            if last:
                counts = loss_sum.new_tensor([float(stop), own_bad, own_unnamed])
                facts = strategy.start_sum(torch.cat([loss_sum[None], counts]), "step facts")
            strategy.backward(passing, last=last)
        strategy.finish()
        mean_loss, stops, bad, unnamed = facts.wait().tolist()
        if bad:
            mean_loss = self._exclude_bad_images(round(bad), mean_loss)
        if not math.isfinite(mean_loss):
            raise FloatingPointError(f"loss is {mean_loss}")
        grad_norm = self._clip() if self.cfg.clip_norm else None
        self._update()
        return StepReport(
            loss=mean_loss,
            stop_asked=stops > 0,
            step_s=perf_counter() - start,
            data_wait_s=data_wait_s,
            exposed_comm_s=strategy.traffic.waited_s,
            bytes_sent=dict(strategy.traffic.sent),
            bytes_received=dict(strategy.traffic.received),
            bad_images=round(bad),
            any_unnamed=unnamed > 0,
            grad_norm=grad_norm,
        )

    @contextmanager
    def evaluating(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """The whole net in evaluation mode: images (b, 3, side, side) -> logits. Every rank must call it."""
        with self.strategy.whole_model() as model, torch.no_grad():
            model.eval()

            def logits(images: Tensor) -> Tensor:
                with self.strategy.autocast():
                    return model(images.to(self.strategy.weight_dtype)).float()

            yield logits

    def parts(self) -> Iterator[tuple[str, Tensor, Slice | None]]:
        """Weights, running statistics, momentum: (name in the whole net, live tensor, the part it is)."""
        yield from self.strategy.named_buffers()
        for name, parameter, part in self.strategy.named_parameters():
            yield name, parameter.detach(), part
            yield f"{MOMENTUM}{name}", self._momentum(parameter), part

    def whole_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the whole tensors, by the names of `parts`."""
        with torch.device("meta"):
            model = build_model(self.cfg.model, self.cfg.classes)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        return shapes | {f"{MOMENTUM}{name}": tuple(p.shape) for name, p in model.named_parameters()}

    def gather(self) -> dict[str, Tensor]:
        """All of `parts` as whole tensors on the ranks of rank 0's fc_group, empty on others.

        Every rank must call it. Tensors that are not split are live, not copies.
        """
        return self.strategy.gather(self.parts()) if self.strategy.in_root_group else {}

    def scaler_state(self) -> dict[str, float]:
        """The loss scale of fp16 in plain numbers; empty for other precisions."""
        return self._scaler.state_dict() if self._scaler else {}

    def load_scaler_state(self, state: dict[str, float]) -> None:
        if self._scaler and state:
            self._scaler.load_state_dict(state)

    def weights_changed(self) -> None:
        """Call after writing into `parts`."""
        self.strategy.classifier.weights_changed()

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        return next(o.state[parameter] for o in self._optimizers if parameter in o.state)["momentum_buffer"]

    def _set_lr(self, lr: float) -> None:
        """Set the learning rate; a classifier updated in turns gets less, because its batch is smaller."""
        for group in (group for optimizer in self._optimizers for group in optimizer.param_groups):
            group["lr"] = lr
        if len(self._optimizers) > 1:
            self._optimizers[0].param_groups[0]["lr"] = lr * self.strategy.fc_update_share

    def _exclude_bad_images(self, bad: int, loss: float) -> float:
        """Rescale gradients and loss to means over the good images of the global batch; returns that loss."""
        images = self.cfg.global_batch(self.world.size)
        if self.cfg.bad_images == "fail" or bad == images:
            raise BadBatch
        self.strategy.exclude_bad_images(bad)
        return loss * images / (images - bad)

    def _clip(self) -> float:
        """Clip the gradient norm to clip_norm; returns the norm before (Pascanu et al. 2013).

        The scaler of fp16 handles infinite gradients itself.
        """
        if self._scaler:
            self._scaler.unscale_(self._optimizers[-1])
        norm = self.strategy.gradient_norm()
        if not math.isfinite(norm) and not self._scaler:
            raise FloatingPointError(f"gradient norm is {norm}")
        if norm > self.cfg.clip_norm:
            self.strategy.scale_gradients(self.cfg.clip_norm / norm)
        return norm

    def _update_classifier(self) -> None:
        self._optimizers[0].step()

    def _update(self) -> None:
        optimizer = self._optimizers[-1]
        if self._scaler:
            self._scaler.step(optimizer)  # unscales; skips the update if a gradient overflowed
            self._scaler.update()
        else:
            optimizer.step()
        self.weights_changed()


def _build_scaler():
    """torch.amp's scaler; torch 2.0 has it under another name."""
    return torch.amp.GradScaler("cuda") if hasattr(torch.amp, "GradScaler") else torch.cuda.amp.GradScaler()
