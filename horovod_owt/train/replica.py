"""One rank's part of the net and its optimizer: a training step, and its state as whole tensors by name."""

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
    save_asked: bool = False  # by any rank: a checkpoint after this step
    step_s: float
    data_wait_s: float
    exposed_comm_s: float
    bytes_sent: dict[str, int] = field(default_factory=dict)  # by this rank, by what they carry
    bytes_received: dict[str, int] = field(default_factory=dict)
    bad_images: int = 0  # in the global batch, not counted
    any_unnamed: bool = False  # whether a rank read a bad image that is not announced yet
    grad_norm: float | None = None  # of the whole net, before clipping; None if it was not measured
    ranks: RankTimes | None = None  # of the step before, on rank 0; None in the first


class _Facts(NamedTuple):
    """What all ranks know of a step: the first five are sums over them."""

    loss: float
    stops: float
    bad: float
    unnamed: float
    saves: float
    grad_norm: float | None
    spent: np.ndarray  # by each rank in the step before


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
        in_turns = cfg.fc_batch == "local"  # then the classifier has an optimizer of its own
        self._optimizers = [build_optimizer(p, cfg) for p in ([fc, conv] if in_turns else [fc + conv])]
        self.average = WeightAverage(cfg.ema, self.strategy) if cfg.ema else None
        self._scaler = _build_scaler() if cfg.precision == "fp16" else None
        self._rates = 0.0, 0.0  # learning rate and weight decay of the step
        # Its factors are fp32; the scaler of fp16 decides for itself, and LARS needs the final gradients.
        on_gpu = world.device.type == "cuda" and cfg.precision in ("fp32", "bf16")
        self._update_decides = on_gpu and is_fused(self._optimizers[-1]) and cfg.optimizer == "sgd"
        self._data_waits = Waits(world.device)
        self._spent = np.zeros(len(PARTS), np.float32)  # by this rank in the step before
        self._skip: Tensor | None = None  # 1 after a turn of this step whose loss is not finite

    def train_step(
        self,
        next_batch: Callable[[], Batch],
        *,
        consumed: int,
        lr: float,
        weight_decay: float | None = None,
        stop: bool = False,
        save: bool = False,
        named: Container[int] = (),
        measure_norm: bool = False,
        compress: bool = True,
        fetch_next: Callable[[], None] = lambda: None,
    ) -> StepReport:
        """One optimizer update over `accum_steps` micro-batches.

        `weight_decay` is the configuration's by default. `stop` asks all ranks to stop after it, `save` to
        write a checkpoint.

        `measure_norm` asks for the gradient norm without clip_norm, `compress` for compressed gradients where
        they are configured; on all ranks.

        `fetch_next` is called while the device is at work on a micro-batch, to fetch the next one meanwhile.

        `consumed` samples of the endless stream came before this step; `named` are the bad images already
        announced to all ranks. Raises on every rank, before the update: FloatingPointError if the loss (or
        the gradient norm, if it is measured) is NaN or infinite on any rank, and BadBatch for a bad image
        under bad_images=fail, or if no image is good.
        """
        start, strategy = perf_counter(), self.strategy
        self._data_waits.reset()
        strategy.model.train()
        strategy.begin_step(compress=compress)
        self._set_rates(lr, self.cfg.weight_decay if weight_decay is None else weight_decay)
        self._skip = None
        scale = self._scaler.scale(torch.ones((), device=self.world.device)) if self._scaler else None
        losses: list[Tensor] = []
        own_bad, own_unnamed = 0, 0
        for micro_step in range(self.cfg.accum_steps):
            last = micro_step == self.cfg.accum_steps - 1
            with self._data_waits.waiting(), now.phase("reading images"):
                batch = next_batch()
            own_bad += len(batch.faults)
            own_unnamed += sum(index not in named for index in batch.bad_images())
            passing = strategy.convolve(batch.images, batch.labels, consumed=consumed, micro_step=micro_step)
            losses.append(strategy.classify(passing, last=last, gradient_scale=scale))
            if last:
                facts = upload(self._own_facts(stop, own_bad, own_unnamed, save), self.world.device)
                facts[0].add_(sum(losses[1:], losses[0]))
                facts = strategy.start_sum(facts, "step facts")
            strategy.backward(passing, last=last)
            with self._data_waits.waiting(), now.phase("reading images"):
                fetch_next()
        strategy.finish()
        facts = self._update(facts.wait(), measure_norm)
        times = dict(
            step_s=perf_counter() - start,
            data_wait_s=self._data_waits.waited_s(),
            exposed_comm_s=strategy.traffic.waited_s(),
        )
        self._spent[:] = spent(**times)
        return StepReport(
            loss=facts.loss,
            stop_asked=facts.stops > 0,
            save_asked=facts.saves > 0,
            **times,
            bytes_sent=dict(strategy.traffic.sent),
            bytes_received=dict(strategy.traffic.received),
            bad_images=round(facts.bad),
            any_unnamed=facts.unnamed > 0,
            grad_norm=facts.grad_norm,
            ranks=RankTimes.from_flat(facts.spent) if self.world.is_root else None,
        )

    @contextmanager
    def evaluating(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """The whole net in evaluation mode: images (b, 3, side, side) -> logits. Every rank must call it."""
        with self.strategy.whole_model() as model, torch.no_grad():
            yield self._logits_of(model)

    @torch.no_grad()
    def averaged_net(self) -> Callable[[Tensor], Tensor] | None:
        """The same of the averaged weights as they are now; None with ema=0."""
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
        """The averaged net, in the form of `parts`; what cannot be averaged, a count, is the net's own."""
        for name, tensor, part in (*self.strategy.named_buffers(), *self.strategy.named_parameters()):
            yield name, self.average.tensors.get(name, tensor), part

    def average_running_statistics(self) -> None:
        """Set batch norm statistics, and their moving average, to the mean over all ranks."""
        self.strategy.average_running_statistics(self.average.tensors if self.average else {})

    def parts(self) -> Iterator[tuple[str, Tensor, Slice | None]]:
        """Weights, running statistics, momentum and averages: (name, live tensor, the part that it is).

        Names are those in the whole net, with a prefix for momentum and averages.
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
        """The shapes of the tensors of `gather`, by their names."""
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
        """All of `parts` as whole tensors, and the state of compression, on the ranks of rank 0's fc_group.

        Empty on others. Every rank must call it. Tensors that are not split are live, not copies.
        """
        kept = self.strategy.compression.gather()
        return self.strategy.gather(self.parts()) | kept if self.strategy.in_root_group else {}

    def scaler_state(self) -> dict[str, float]:
        """The loss scale of fp16 in plain numbers; empty for other precisions."""
        return self._scaler.state_dict() if self._scaler else {}

    def load_scaler_state(self, state: dict[str, float]) -> None:
        if self._scaler and state:
            self._scaler.load_state_dict(state)

    def reset_momentum(self) -> None:
        """As if the optimizer were new."""
        for _, parameter, _ in self.strategy.named_parameters():
            self._momentum(parameter).zero_()

    def weights_changed(self) -> None:
        """Call after writing into `parts`."""
        self.strategy.classifier.weights_changed()

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        return next(o.state[parameter] for o in self._optimizers if parameter in o.state)["momentum_buffer"]

    def _set_rates(self, lr: float, weight_decay: float) -> None:
        """Set the learning rate; a classifier updated in turns gets less, because its batch is smaller."""
        self._rates = lr, weight_decay
        if self.cfg.optimizer == "lars":
            lr, weight_decay = 1.0, 0.0  # both are in its gradients
        for group in (group for optimizer in self._optimizers for group in optimizer.param_groups):
            group["lr"], group["weight_decay"] = lr, weight_decay
        if len(self._optimizers) > 1:
            self._optimizers[0].param_groups[0]["lr"] = lr * self.strategy.fc_update_share

    def _own_facts(self, stop: bool, bad: int, unnamed: int, save: bool) -> np.ndarray:
        """This rank's share of a step's sums, without the loss, and its times at its place in the ranks'."""
        facts = np.zeros(NUM_SUMS + len(PARTS) * self.world.size, np.float32)
        facts[:NUM_SUMS] = 0, stop, bad, unnamed, save
        facts[NUM_SUMS:].reshape(-1, len(PARTS))[self.world.rank] = self._spent
        return facts

    def _update(self, facts: Tensor, measure_norm: bool) -> _Facts:
        """Update the weights, or raise.

        `facts` are summed over the ranks, on the device. The host waits for the device once.
        """
        # With fc_batch=local the gradients of the FC layers are those of the last turn only.
        measure_norm = self.cfg.clip_norm > 0 or (measure_norm and self.cfg.fc_batch == "global")
        if self._scaler and measure_norm:
            self._scaler.unscale_(self._optimizers[-1])
        norm = self.strategy.gradient_norm() if measure_norm else None
        arriving = Download(facts if norm is None else torch.cat([facts.double(), norm]))
        if self._update_decides:
            self._update_unless_forbidden(facts, norm)
        values = arriving.array()  # three for each rank: no list of Python's numbers
        grad_norm = None if norm is None else float(values[-1])
        loss, stops, bad, unnamed, saves = values[:NUM_SUMS].tolist()
        spent_by_all = values[NUM_SUMS:][: len(PARTS) * self.world.size]
        factor = self._mean_factor(round(bad))
        loss *= factor
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss is {loss}")
        if grad_norm is not None:
            grad_norm *= factor
            if not math.isfinite(grad_norm) and not self._scaler:  # the scaler handles infinite gradients
                raise FloatingPointError(f"gradient norm is {grad_norm}")
        if not self._update_decides:
            if bad:
                self.strategy.exclude_bad_images(round(bad))
            if grad_norm is not None and 0 < self.cfg.clip_norm < grad_norm:  # Pascanu et al. 2013
                self.strategy.scale_gradients(self.cfg.clip_norm / grad_norm)
            self._step_optimizer()
        self.weights_changed()
        if self.average:
            self.average.update()
        return _Facts(loss, stops, bad, unnamed, saves, grad_norm, spent_by_all)

    def _mean_factor(self, bad: int) -> float:
        """From the mean over the global batch to that over its good images; BadBatch if there is none."""
        images = self.cfg.global_batch(self.world.size)
        if bad and (self.cfg.bad_images == "fail" or bad == images):
            raise BadBatch
        return images / (images - bad)

    def _update_unless_forbidden(self, facts: Tensor, norm: Tensor | None) -> None:
        """Queue the update; it does not happen for what `_update` then raises."""
        images, tolerant = self.cfg.global_batch(self.world.size), self.cfg.bad_images == "skip"
        loss, bad = facts[0], facts[2]
        skip = skip_flag(loss, bad, max_bad=images - 1 if tolerant else 0, norm=norm)
        clip = norm if self.cfg.clip_norm else None
        divide_by = (
            divisor(bad, images, norm=clip, clip_norm=self.cfg.clip_norm)
            if tolerant or clip is not None
            else None
        )
        step_unless(self._optimizers[-1], self._or_earlier(skip), divide_by)

    def _update_classifier(self, facts: Tensor, images: int) -> None:
        """One turn's update: by the mean over the good ones of its `images`, none if there are none.

        `facts` are its loss and its number of bad images. Raises FloatingPointError on all ranks if the loss
        is NaN or infinite; on a GPU the step's end does, and no later update of the step happens.
        """
        optimizer = self._optimizers[0]
        if self._update_decides:
            loss, bad = facts
            self._skip = self._or_earlier(skip_flag(loss, bad, max_bad=images))
            skip = torch.maximum(self._skip, skip_flag(loss, bad, max_bad=images - 1))
            return step_unless(optimizer, skip, divisor(bad, images))
        mean_loss, bad = facts.tolist()
        if not math.isfinite(mean_loss):
            raise FloatingPointError(f"loss is {mean_loss}")
        good = images - round(bad)
        if not good:
            return
        if good < images:
            self.strategy.scale_classifier_gradients(images / good)
        optimizer.step()

    def _or_earlier(self, skip: Tensor) -> Tensor:
        """Skip after an earlier turn whose loss was not finite, too."""
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
    """torch.amp's scaler; torch 2.0 has it under another name."""
    return torch.amp.GradScaler("cuda") if hasattr(torch.amp, "GradScaler") else torch.cuda.amp.GradScaler()
