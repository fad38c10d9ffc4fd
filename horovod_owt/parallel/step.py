"""One training step: the computation and communication of "One weird trick" (arXiv:1404.5997).

Convolutions have most of the arithmetic and few of the weights, so every rank holds all of them and processes
its own images; their gradients are summed over all ranks. Fully connected layers are the reverse, so the
ranks of an fc_group split them: each holds a part of every layer and processes all of the group's images; the
gradients of a part are summed over the ranks that hold it in other groups. With groups of one this is data
parallelism.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from horovod_owt.config import TrainConfig
from horovod_owt.model.alexnet_owt import FC6_IN, AlexNetOWT
from horovod_owt.model.dropout import keep_scale, keys_on
from horovod_owt.parallel import autograd
from horovod_owt.parallel.batch_norm import synchronize_batch_norms
from horovod_owt.parallel.collectives import broadcast_tensor
from horovod_owt.parallel.compression import CompressionState, Compressor, build_compressors
from horovod_owt.parallel.exchange import Exchange, Slice
from horovod_owt.parallel.flat_gradients import FlatGradients
from horovod_owt.parallel.groups import Group
from horovod_owt.parallel.runtime import World
from horovod_owt.parallel.split_classifier import SplitClassifier
from horovod_owt.parallel.traffic import Completed, Traffic, Transfer, start_sum

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The precision of forward passes; weights and gradients stay fp32 (fp64 with precision=fp64)."""
    low = precision in ("bf16", "fp16")
    return torch.autocast(device.type, dtype=DTYPES[precision] if low else torch.bfloat16, enabled=low)


def configure_backends(cfg: TrainConfig) -> None:
    """Configure torch's determinism, cuDNN autotuning and TF32 for this process."""
    if cfg.deterministic != torch.are_deterministic_algorithms_enabled():  # setting it takes seconds
        torch.use_deterministic_algorithms(cfg.deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = not cfg.deterministic  # one image size: cuDNN tunes once
    disable_tf32()


def disable_tf32() -> None:
    """Compute fp32 in full precision: TF32 keeps 10 of the 23 mantissa bits.

    torch enables TF32 for convolutions by default, and for matrix products if
    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE is set, as in NVIDIA's containers.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


@dataclass
class MicroBatch:
    """A micro-batch between the passes of a step."""

    features: Tensor  # (b, 9216), this rank's, with the autograd graph of the convolutions
    labels: Transfer | Completed  # (K*b,), of the whole group
    keys: Tensor  # (K*b, 2), for dropout
    d_features: Tensor | None = None


@dataclass(frozen=True)
class _Turn:
    """Images that pass through the split layers together, and the collectives on their features."""

    rows: slice  # of the group's K*b images
    batches: int  # how many ranks' batches these are
    fetch: Callable[[Tensor], Transfer | Completed]
    send_back: Callable[[Tensor], Transfer | Completed]


class OneWeirdTrick:
    """Forward and backward of a training step, data-parallel or hybrid. Every rank must make the same calls.

    A step: `begin_step`; for each micro-batch `convolve`, `classify`, `backward`; `finish`. Then each
    `parameter.grad` is the mean over the global batch. With fc_batch=local the classifier is updated within
    the step: after each turn its gradients are the mean over the turn's images, and `update_classifier` is
    called with a tensor (loss, bad images) and the number of images. Images with a negative label contribute
    nothing, but count in the means until `exclude_bad_images` corrects these.
    """

    def __init__(
        self,
        model: AlexNetOWT,
        cfg: TrainConfig,
        world: World,
        *,
        update_classifier: Callable[[Tensor, int], None],
    ) -> None:
        self.cfg, self.world = cfg, world
        self.fc_group_size = fc_group_size = cfg.ranks_per_classifier()
        self.traffic = Traffic(world.device)
        self._everyone, self._fc_group = world.everyone, world.fc_group(fc_group_size)
        self._shard_group = world.shard_group(fc_group_size)
        self._update_classifier = update_classifier
        if not self._everyone.is_alone:
            for name, tensor in model.state_dict().items():
                tensor.copy_(broadcast_tensor(tensor, f"first.{name}"))
        self._exchange = Exchange(self._fc_group, self.traffic)
        self.classifier = SplitClassifier(
            model.classifier,
            self._exchange,
            dropout=cfg.dropout,
            label_smoothing=cfg.label_smoothing,
            dtype=DTYPES[cfg.precision],
        )
        self.model = model
        self._unfilled = model.classifier  # if the layers are split: their structure, without memory
        if fc_group_size > 1:
            self._unfilled.to("meta")
            model.classifier = nn.Sequential()
        if cfg.sync_bn:
            synchronize_batch_norms(model.features, self._everyone, self.traffic)
            self.classifier.synchronize_norms(self._shard_group, self.traffic)
        self.conv_parameters = list(model.features.parameters())
        self.fc_parameters = list(self.classifier.parameters.values())
        self._conv_gradients = self._flat(self.conv_parameters, self._everyone, "conv gradients")
        self._conv_gradients.register_hooks()
        shard_exchange = Exchange(self._shard_group, self.traffic)
        named = {f"classifier.{name}": p for name, p in self.classifier.parameters.items()}
        compressors = build_compressors(
            cfg.compression, named, shard_exchange, what="fc gradients", seed=cfg.seed
        )
        self.compression = CompressionState(compressors, shard_exchange)
        self._fc_gradients = self._flat(
            self.fc_parameters,
            self._shard_group,
            "fc gradients",
            {named[name]: each for name, each in compressors.items()},
        )
        # The batch of a classifier update, as a share of the global batch.
        self.fc_update_share = 1 / (fc_group_size * cfg.accum_steps) if self._local else 1.0

    @property
    def name(self) -> str:
        return "data" if self.fc_group_size == 1 else "hybrid"

    @property
    def in_root_group(self) -> bool:
        """Whether this rank shares its FC layers with rank 0."""
        return 0 in self._fc_group.ranks

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of weights and gradients, independent of autocast."""
        return self.conv_parameters[0].dtype

    def begin_step(self, *, compress: bool = True) -> None:
        """Discard the last step's gradients; `compress` is false before compression_start."""
        self.traffic.reset()
        self._conv_gradients.compresses = self._fc_gradients.compresses = compress
        self._conv_gradients.begin_step()
        self._fc_gradients.begin_step()

    def convolve(self, images: Tensor, labels: Tensor, *, consumed: int, micro_step: int) -> MicroBatch:
        """Forward through the convolutions; `consumed` is the number of samples before this step.

        Shapes    images (b, 3, side, side), labels (b,)
        """
        all_labels = self._exchange.allgather_rows(labels, "labels")
        cfg, group = self.cfg, self._fc_group
        starts = [consumed + rank * cfg.rank_batch() + micro_step * cfg.batch for rank in group.ranks]
        positions = np.concatenate([np.arange(start, start + len(labels)) for start in starts])
        keys = keys_on(images.device, cfg.seed, positions)
        kept = self.weight_dtype
        with self.autocast():
            features = self.model.convolve(images.to(kept)).to(kept)
        if cfg.dropout:
            own = keys[group.index * len(labels) :][: len(labels)]
            features = features * keep_scale(own, 0, range(FC6_IN), cfg.dropout)
        return MicroBatch(features, all_labels, keys)

    @torch.no_grad()
    def classify(self, batch: MicroBatch, *, last: bool, gradient_scale: Tensor | None = None) -> Tensor:
        """Forward and backward of the FC layers.

        Returns this rank's share of the loss: over all ranks and micro-batches the shares add up to the mean
        over the global batch. In the `last` micro-batch, the allreduce of the gradients starts.
        """
        own = batch.features.detach().to(DTYPES[self.cfg.precision])
        turns = self._turns(len(own))
        arriving = turns[0].fetch(own)  # before the wait for labels, which on a GPU is for all queued work
        labels, backs, losses = batch.labels.wait(), [], []
        images = len(own) * self._shard_group.size if self._local else self.cfg.global_batch(self.world.size)
        for number, turn in enumerate(turns):
            features = arriving.wait()
            if number + 1 < len(turns):
                arriving = turns[number + 1].fetch(own)
            if self._local:
                self._fc_gradients.begin_step()
            if self._local or (last and number + 1 == len(turns)):
                self._fc_gradients.begin_last_backward()
            loss, back = self.classifier.forward_backward(
                features,
                labels[turn.rows],
                batch.keys[turn.rows],
                turn.send_back,
                self._fc_gradients,
                gradient_factor=1 / images,
                gradient_scale=gradient_scale,
                batches=turn.batches,
            )
            backs.append(back)
            losses.append(loss.float())
            if self._local:
                self._update_in_turn(loss, labels[turn.rows], images)
        self.classifier.end_micro_batch()
        d_features = [back.wait() for back in backs][self._fc_group.index if len(backs) > 1 else 0]
        batch.d_features = d_features * self.fc_update_share if self._local else d_features
        share = self.fc_update_share / self._fc_group.size
        return sum(losses[1:], losses[0]) * (share / images)

    def backward(self, batch: MicroBatch, *, last: bool) -> None:
        """Backward of the convolutions; in the `last` micro-batch gradients are sent when ready."""
        if last:
            self._conv_gradients.begin_last_backward()
        autograd.backward(batch.features, batch.d_features.to(batch.features.dtype))

    def start_sum(self, values: Tensor, what: str) -> Transfer | Completed:
        """Start an allreduce of a few numbers over all ranks, to overlap with the caller's computation."""
        return start_sum(values, self._everyone, self.traffic, what=what, name=what)

    def finish(self) -> None:
        """Wait until every gradient is the mean over the global batch."""
        self._fc_gradients.finish()
        self._conv_gradients.finish()

    def exclude_bad_images(self, bad_images: int) -> None:
        """Rescale the gradients to the mean over the good images. Every rank calls it after `finish`."""
        images = self.cfg.global_batch(self.world.size)
        self.scale_gradients(images / (images - bad_images))

    def scale_classifier_gradients(self, factor: float) -> None:
        """Scale the gradients of one turn, in `update_classifier`."""
        self._fc_gradients.scale(factor)

    def scale_gradients(self, factor: float) -> None:
        """Scale all gradients, except with fc_batch=local the classifier's, which are already applied."""
        self._conv_gradients.scale(factor)
        if not self._local:
            self._fc_gradients.scale(factor)

    def gradient_norm(self) -> Tensor:
        """Euclidean norm of the whole model's gradient, (1,). Every rank must call it after `finish`."""
        split, whole = (
            [p.grad for _, p, part in self.named_parameters() if (part is None) == unsplit]
            for unsplit in (False, True)
        )
        total = _sum_of_squares(split, self.world.device)
        total = self._exchange.allreduce(total, "gradient norm").wait()
        return (total + _sum_of_squares(whole, self.world.device)).sqrt()

    def layer_norms(self) -> Tensor:
        """Euclidean norms of each whole tensor of `named_parameters` and of its gradient: (n, 2), float64.

        Every rank must call it after `finish`.
        """
        named = list(self.named_parameters())
        norms = [torch.linalg.vector_norm(t.detach()).double() for _, p, _ in named for t in (p, p.grad)]
        squares = torch.stack(norms).square().view(-1, 2)
        split = torch.tensor([[part is not None] for *_, part in named], device=squares.device)
        over_group = self._exchange.allreduce(squares * split, "layer norms").wait()
        return torch.where(split, over_group, squares).sqrt()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter, Slice | None]]:
        """This rank's parameters: (name in the whole model, parameter, its slice if it is split)."""
        for name, parameter in self.model.features.named_parameters():
            yield f"features.{name}", parameter, None
        for name, parameter in self.classifier.parameters.items():
            yield f"classifier.{name}", parameter, self.classifier.slices[name]

    def named_buffers(self) -> Iterator[tuple[str, Tensor, Slice | None]]:
        """The running statistics, in the form of `named_parameters`."""
        for name, buffer in self.model.features.named_buffers():
            yield f"features.{name}", buffer, None
        for name, buffer in self.classifier.buffers.items():
            yield f"classifier.{name}", buffer, self.classifier.slices.get(name)

    def gather(self, named: Iterable[tuple[str, Tensor, Slice | None]]) -> dict[str, Tensor]:
        """Whole tensors by name; every rank of a group must call it. Unsplit tensors are not copied."""
        return {name: self._exchange.gather_whole(tensor.detach(), part) for name, tensor, part in named}

    @contextmanager
    def whole_model(self) -> Iterator[AlexNetOWT]:
        """The model with whole layers, within the block. Every rank of a group must enter it."""
        if self.fc_group_size == 1:
            yield self.model
            return
        split = self.model.classifier
        whole = copy.deepcopy(self._unfilled).to_empty(device=self.world.device)
        tensors = {**self.classifier.parameters, **self.classifier.buffers}
        named = ((name, tensor, self.classifier.slices.get(name)) for name, tensor in tensors.items())
        whole.load_state_dict(self.gather(named))
        self.model.classifier = whole
        try:
            yield self.model
        finally:
            self.model.classifier = split

    def average_running_statistics(self, averages: Mapping[str, Tensor]) -> None:
        """Set every rank's batch norm statistics to the mean over the ranks.

        `averages` has their moving averages (config key `ema`) by the same names, if there are any.
        """
        for over, prefix, named in (
            (self._everyone, "features", self.model.features.named_buffers()),
            (self._shard_group, "classifier", self.classifier.buffers.items()),
        ):
            for name, buffer in named:
                if buffer.is_floating_point() and not over.is_alone:
                    average = averages.get(f"{prefix}.{name}")
                    for what, tensor in (("buffer", buffer), ("average", average)):
                        if tensor is not None:
                            name_sent = f"{what}.{name}"
                            total = start_sum(tensor, over, self.traffic, what="buffers", name=name_sent)
                            tensor.copy_(total.wait() / over.size)

    def autocast(self) -> torch.autocast:
        return autocast(self.cfg.precision, self.world.device)

    @property
    def _local(self) -> bool:
        return self.cfg.fc_batch == "local"

    def _flat(
        self,
        parameters: list[nn.Parameter],
        group: Group,
        name: str,
        compressors: Mapping[nn.Parameter, Compressor] | None = None,
    ) -> FlatGradients:
        return FlatGradients(
            parameters,
            group,
            self.traffic,
            name=name,
            compression=self.cfg.compression,
            compressors=compressors,
        )

    def _turns(self, batch: int) -> list[_Turn]:
        """Scheme (a): all images at once. Scheme (b): one rank's batch at a time, broadcast to the others."""
        exchange, size = self._exchange, self._fc_group.size
        if self.cfg.owt_scheme == "a":
            return [
                _Turn(
                    slice(None),
                    size,
                    lambda own: exchange.allgather_rows(own, "features"),
                    lambda parts: exchange.reduce_scatter_rows(parts, "features back"),
                )
            ]
        return [
            _Turn(
                slice(owner * batch, (owner + 1) * batch),
                1,
                lambda own, owner=owner: exchange.broadcast_rows(own, owner, "features"),
                lambda parts, owner=owner: exchange.reduce_rows(parts, owner, "features back"),
            )
            for owner in range(size)
        ]

    def _update_in_turn(self, loss: Tensor, labels: Tensor, images: int) -> None:
        """Update the classifier with the mean gradient of a turn of `images`; `labels` are this group's."""
        own_loss = loss / (images * self.world.size)
        facts = torch.stack([own_loss, (labels < 0).sum().to(loss) / self._fc_group.size])
        facts = start_sum(facts, self._everyone, self.traffic, what="loss", name="turn_facts")
        self._fc_gradients.finish()
        self._update_classifier(facts.wait(), images)
        self.classifier.weights_changed()


def _sum_of_squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    zero = torch.zeros(1, dtype=torch.float64, device=device)
    return sum((torch.linalg.vector_norm(tensor).double().square() for tensor in tensors), zero)
