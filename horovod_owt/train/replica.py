"""One rank's model, optimizer and training step, and its state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from horovod_owt.config import TrainConfig
from horovod_owt.data.batch import Batch
from horovod_owt.data.copies import Download, upload
from horovod_owt.model import build_model
from horovod_owt.parallel.activity import now
from horovod_owt.parallel.exchange import Slice
from horovod_owt.parallel.optimizer import build_optimizer, is_fused, scale_by_layer
from horovod_owt.parallel.runtime import World
from horovod_owt.parallel.step import OneWeirdTrick, configure_backends
from horovod_owt.parallel.traffic import Waits
from horovod_owt.train.average import WeightAverage
from horovod_owt.train.rank_times import PARTS, RankTimes, spent
from horovod_owt.train.update import divisor, skip_flag, step_unless

MOMENTUM = "momentum."  # prefix of a parameter's momentum
AVERAGE = "average."  # prefix of the moving average of a weight or running statistic


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """The result of one optimizer update; `loss` and `stop_asked` are the same on every rank."""

    loss: float  # mean over the good images of the global batch
    stop_asked: bool  # by any rank
    save_asked: bool = False  # by any rank: write a checkpoint after this step
    step_s: float
    data_wait_s: float
    exposed_comm_s: float
    bytes_sent: dict[str, int] = field(default_factory=dict)  # by this rank, by purpose
    bytes_received: dict[str, int] = field(default_factory=dict)
    bad_images: int = 0  # in the global batch, not counted
    any_unannounced: bool = False  # whether a rank read a bad image that is not announced yet
    grad_norm: float | None = None  # of the whole model, before clipping; None if it was not measured
    ranks: RankTimes | None = None  # of the previous step, on rank 0; None in the first


class _StepTotals(NamedTuple):
    """What all ranks know of a step; the first five are sums over the ranks."""

    loss: float
    stops: float
    bad: float
    unannounced: float
    saves: float
    grad_norm: float | None
    spent: np.ndarray  # by each rank in the previous step


NUM_SUMS = 5


class BadBatch(Exception):
    """A global batch with bad images under bad_images=fail, or without good ones. Raised on every rank."""


class Replica:
    """Model, strategy and optimizer of this rank."""

    def __init__(self, cfg: TrainConfig, world: World) -> None:
        self.cfg, self.world = cfg, world
        configure_backends(cfg)
        model = build_model(cfg.model, cfg.classes, dropout=cfg.dropout, seed=cfg.seed).to(world.device)
        model = model.double() if cfg.precision == "fp64" else model
        model = model.to(memory_format=torch.channels_last) if cfg.channels_last else model
        self.strategy = OneWeirdTrick(model, cfg, world, update_classifier=self._update_classifier)
        conv, fc = self.strategy.conv_parameters, self.strategy.fc_parameters
        in_turns = cfg.fc_batch == "local"  # the classifier then has its own optimizer
        self._optimizers = [build_optimizer(p, cfg) for p in ([fc, conv] if in_turns else [fc + conv])]
        self.average = WeightAverage(cfg.ema, self.strategy) if cfg.ema else None
        self._scaler = _build_scaler() if cfg.precision == "fp16" else None
        self._rates = 0.0, 0.0  # learning rate and weight decay of the step
        # Whether the GPU itself skips updates, see `update`. Its factors are fp32; fp16's scaler skips
        # updates itself, and LARS needs the final gradients.
        on_gpu = world.device.type == "cuda" and cfg.precision in ("fp32", "bf16")
        self._skips_on_device = on_gpu and is_fused(self._optimizers[-1]) and cfg.optimizer == "sgd"
        self._data_waits = Waits(world.device)
        self._spent = np.zeros(len(PARTS), np.float32)  # by this rank in the previous step
        self._skip: Tensor | None = None  # 1 after a turn of this step whose loss was not finite

    def train_step(
        self,
        next_batch: Callable[[], Batch],
        *,
        consumed: int,
        lr: float,
        weight_decay: float | None = None,
        stop: bool = False,
        save: bool = False,
        announced: Container[int] = (),
        measure_norm: bool = False,
        compress: bool = True,
        fetch_next: Callable[[], None] = lambda: None,
    ) -> StepReport:
        """One optimizer update over `accum_steps` micro-batches. Every rank must call it.

        consumed       samples of the endless stream before this step, over all ranks
        weight_decay   by default, that of the configuration
        stop, save     ask all ranks to stop, or write a checkpoint, after this step
        announced      indices of bad images that are already announced to all ranks
        measure_norm   measure the gradient norm even without clip_norm; the same on all ranks
        compress       apply the configured compression; the same on all ranks
        fetch_next     called while the device computes, to fetch the next micro-batch meanwhile

        Raises, on every rank and before the update: FloatingPointError if the loss (or the gradient norm, if
        measured) is NaN or infinite on any rank; BadBatch for a bad image under bad_images=fail, or if no
        image is good.
        """
        start, strategy = perf_counter(), self.strategy
        self._data_waits.reset()
        strategy.model.train()
        strategy.begin_step(compress=compress)
        self._set_rates(lr, self.cfg.weight_decay if weight_decay is None else weight_decay)
        self._skip = None
        scale = self._scaler.scale(torch.ones((), device=self.world.device)) if self._scaler else None
        losses: list[Tensor] = []
        own_bad, own_unannounced = 0, 0
        for micro_step in range(self.cfg.accum_steps):
            last = micro_step == self.cfg.accum_steps - 1
            with self._data_waits.waiting(), now.phase("reading images"):
                batch = next_batch()
            own_bad += len(batch.faults)
            own_unannounced += sum(index not in announced for index in batch.bad_images())
            micro_batch = strategy.convolve(
                batch.images, batch.labels, consumed=consumed, micro_step=micro_step
            )
            losses.append(strategy.classify(micro_batch, last=last, gradient_scale=scale))
            if last:
                totals = upload(self._own_totals(stop, own_bad, own_unannounced, save), self.world.device)
                totals[0].add_(sum(losses[1:], losses[0]))
                transfer = strategy.start_sum(totals, "step facts")
            strategy.backward(micro_batch, last=last)
            with self._data_waits.waiting(), now.phase("reading images"):
                fetch_next()
        strategy.finish()
        step = self._update(transfer.wait(), measure_norm)
        times = dict(
            step_s=perf_counter() - start,
            data_wait_s=self._data_waits.waited_s(),
            exposed_comm_s=strategy.traffic.waited_s(),
        )
        self._spent[:] = spent(**times)
        return StepReport(
            loss=step.loss,
            stop_asked=step.stops > 0,
            save_asked=step.saves > 0,
            **times,
            bytes_sent=dict(strategy.traffic.sent),
            bytes_received=dict(strategy.traffic.received),
            bad_images=round(step.bad),
            any_unannounced=step.unannounced > 0,
            grad_norm=step.grad_norm,
            ranks=RankTimes.from_flat(step.spent) if self.world.is_root else None,
        )

    @contextmanager
    def evaluating(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """The whole model in evaluation mode: images (b, 3, side, side) -> logits. All ranks enter it."""
        with self.strategy.whole_model() as model, torch.no_grad():
            yield self._logits_of(model)

    @torch.no_grad()
    def averaged_model(self) -> Callable[[Tensor], Tensor] | None:
        """A copy of the averaged model, images -> logits; None with ema=0. Every rank must call it."""
        if self.average is None:
            return None
        with torch.device("meta"):
            model = build_model(self.cfg.model, self.cfg.classes)
        model = model.to_empty(device=self.world.device).to(self.strategy.weight_dtype)
        model.load_state_dict(self.strategy.gather(self._averaged()))
        return self._logits_of(
            model.to(memory_format=torch.channels_last) if self.cfg.channels_last else model
        )

    def _logits_of(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        model.eval()

        @torch.no_grad()
        def logits(images: Tensor) -> Tensor:
            with self.strategy.autocast():
                return model(images.to(self.strategy.weight_dtype)).float()

        return logits

    def _averaged(self) -> Iterator[tuple[str, Tensor, Slice | None]]:
        """The averaged model in the form of `state_tensors`, with the live counters of batches."""
        for name, tensor, part in (*self.strategy.named_buffers(), *self.strategy.named_parameters()):
            yield name, self.average.tensors.get(name, tensor), part

    def average_running_statistics(self) -> None:
        """Set batch norm statistics, and their moving average, to their mean over the ranks."""
        self.strategy.average_running_statistics(self.average.tensors if self.average else {})

    def state_tensors(self) -> Iterator[tuple[str, Tensor, Slice | None]]:
        """Weights, running statistics, momentum and averages: (name, live tensor, its slice if it is split).

        Names are those in the whole model, with a prefix for momentum and averages.
        """
        yield from self.strategy.named_buffers()
        if self.average:
            for name, tensor, part in self._averaged():
                if name in self.average.tensors:
                    yield f"{AVERAGE}{name}", tensor, part
        for name, parameter, part in self.strategy.named_parameters():
            yield name, parameter.detach(), part
            yield f"{MOMENTUM}{name}", self._momentum(parameter), part

    def whole_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that `gather` returns, by name."""
        with torch.device("meta"):
            model = build_model(self.cfg.model, self.cfg.classes)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        averages = self.average.tensors if self.average else ()
        return {
            **shapes,
            **{f"{MOMENTUM}{name}": tuple(p.shape) for name, p in model.named_parameters()},
            **{f"{AVERAGE}{name}": shapes[name] for name in averages},
            **self.strategy.compression.shapes(),
        }

    def gather(self) -> dict[str, Tensor]:
        """`state_tensors` as whole tensors, and the state of compression, on the ranks of rank 0's fc_group.

        Empty on other ranks. Every rank must call it. Tensors that are not split are live, not copies.
        """
        compression = self.strategy.compression.gather()
        if not self.strategy.in_root_group:
            return {}
        return self.strategy.gather(self.state_tensors()) | compression

    def scaler_state(self) -> dict[str, float]:
        """The state of fp16's loss scaler; empty for other precisions."""
        return self._scaler.state_dict() if self._scaler else {}

    def load_scaler_state(self, state: dict[str, float]) -> None:
        if self._scaler and state:
            self._scaler.load_state_dict(state)

    def reset_momentum(self) -> None:
        """Set the momentum of all parameters to 0."""
        for _, parameter, _ in self.strategy.named_parameters():
            self._momentum(parameter).zero_()

    def weights_changed(self) -> None:
        """Call after writing to `state_tensors`."""
        self.strategy.classifier.weights_changed()

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        return next(o.state[parameter] for o in self._optimizers if parameter in o.state)["momentum_buffer"]

    def _set_rates(self, lr: float, weight_decay: float) -> None:
        """Set learning rate and weight decay; a classifier updated in turns gets a lower rate."""
        self._rates = lr, weight_decay
        if self.cfg.optimizer == "lars":
            lr, weight_decay = 1.0, 0.0  # `scale_by_layer` applies both to the gradients
        for group in (group for optimizer in self._optimizers for group in optimizer.param_groups):
            group["lr"], group["weight_decay"] = lr, weight_decay
        if len(self._optimizers) > 1:
            self._optimizers[0].param_groups[0]["lr"] = lr * self.strategy.fc_update_share

    def _own_totals(self, stop: bool, bad: int, unannounced: int, save: bool) -> np.ndarray:
        """This rank's contribution to the step's totals, without the loss."""
        totals = np.zeros(NUM_SUMS + len(PARTS) * self.world.size, np.float32)
        totals[:NUM_SUMS] = 0, stop, bad, unannounced, save
        totals[NUM_SUMS:].reshape(-1, len(PARTS))[self.world.rank] = self._spent
        return totals

    def _update(self, totals: Tensor, measure_norm: bool) -> _StepTotals:
        """Update the weights, or raise.

        `totals` are summed over the ranks, on the device. The host waits for the device only once.
        """
        # With fc_batch=local the gradients of the FC layers are those of the last turn only.
        measure_norm = self.cfg.clip_norm > 0 or (measure_norm and self.cfg.fc_batch == "global")
        if self._scaler and measure_norm:
            self._scaler.unscale_(self._optimizers[-1])
        norm = self.strategy.gradient_norm() if measure_norm else None
        download = Download(totals if norm is None else torch.cat([totals.double(), norm]))
        if self._skips_on_device:
            self._queue_update(totals, norm)
        values = download.array()  # three per rank, so not a Python list
        grad_norm = None if norm is None else float(values[-1])
        loss, stops, bad, unannounced, saves = values[:NUM_SUMS].tolist()
        spent_by_all = values[NUM_SUMS:][: len(PARTS) * self.world.size]
        factor = self._mean_factor(round(bad))
        loss *= factor
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss is {loss}")
        if grad_norm is not None:
            grad_norm *= factor
            if not math.isfinite(grad_norm) and not self._scaler:  # the scaler handles infinite gradients
                raise FloatingPointError(f"gradient norm is {grad_norm}")
        if not self._skips_on_device:
            if bad:
                self.strategy.exclude_bad_images(round(bad))
            if grad_norm is not None and 0 < self.cfg.clip_norm < grad_norm:  # Pascanu et al. 2013
                self.strategy.scale_gradients(self.cfg.clip_norm / grad_norm)
            self._step_optimizer()
        self.weights_changed()
        if self.average:
            self.average.update()
        return _StepTotals(loss, stops, bad, unannounced, saves, grad_norm, spent_by_all)

    def _mean_factor(self, bad: int) -> float:
        """Factor from the mean over the global batch to that over its good images; may raise BadBatch."""
        images = self.cfg.global_batch(self.world.size)
        if bad and (self.cfg.bad_images == "fail" or bad == images):
            raise BadBatch
        return images / (images - bad)

    def _queue_update(self, totals: Tensor, norm: Tensor | None) -> None:
        """Queue the update on the device, which skips it in the cases in which `_update` then raises."""
        images, tolerant = self.cfg.global_batch(self.world.size), self.cfg.bad_images == "skip"
        loss, bad = totals[0], totals[2]
        skip = skip_flag(loss, bad, max_bad=images - 1 if tolerant else 0, norm=norm)
        clip = norm if self.cfg.clip_norm else None
        divide_by = (
            divisor(bad, images, norm=clip, clip_norm=self.cfg.clip_norm)
            if tolerant or clip is not None
            else None
        )
        step_unless(self._optimizers[-1], self._or_earlier(skip), divide_by)

    def _update_classifier(self, totals: Tensor, images: int) -> None:
        """Update the classifier after a turn, with the mean over the good ones of its `images`, if any.

        `totals` are the turn's loss and number of bad images. Raises FloatingPointError on all ranks if the
        loss is NaN or infinite; on a GPU the end of the step does, and the step's later updates are skipped.
        """
        optimizer = self._optimizers[0]
        if self._skips_on_device:
            loss, bad = totals
            self._skip = self._or_earlier(skip_flag(loss, bad, max_bad=images))
            skip = torch.maximum(self._skip, skip_flag(loss, bad, max_bad=images - 1))
            return step_unless(optimizer, skip, divisor(bad, images))
        mean_loss, bad = totals.tolist()
        if not math.isfinite(mean_loss):
            raise FloatingPointError(f"loss is {mean_loss}")
        good = images - round(bad)
        if not good:
            return
        if good < images:
            self.strategy.scale_classifier_gradients(images / good)
        optimizer.step()

    def _or_earlier(self, skip: Tensor) -> Tensor:
        """`skip`, or 1 after an earlier turn of this step whose loss was not finite."""
        return skip if self._skip is None else torch.maximum(self._skip, skip)

    def _step_optimizer(self) -> None:
        optimizer = self._optimizers[-1]
        if self.cfg.optimizer == "lars":
            lr, weight_decay = self._rates
            parameters = [parameter for _, parameter, _ in self.strategy.named_parameters()]
            norms = self.strategy.layer_norms()
            scale_by_layer(parameters, norms, lr=lr, weight_decay=weight_decay, eta=self.cfg.lars_eta)
        if self._scaler:
            self._scaler.step(optimizer)  # unscales; skips the update if a gradient overflowed
            self._scaler.update()
        else:
            optimizer.step()


def _build_scaler():
    """A gradient scaler; its class has another name in torch 2.0."""
    return torch.amp.GradScaler("cuda") if hasattr(torch.amp, "GradScaler") else torch.cuda.amp.GradScaler()
