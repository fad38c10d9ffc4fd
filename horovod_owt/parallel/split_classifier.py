"""The fully connected layers, split over the ranks of an fc_group: each rank holds a part of every layer.

    fc6  by output units (columns)   reads every image's features, computes its own hidden units
    fc7  by input units (rows)       reads its own hidden units, computes a partial sum of every unit
    fc8  by input units (rows)       likewise; each rank of the group gets all logits

So the features are gathered once, and there are two more exchanges: fc7's units and the logits. With K ranks
of b images, a rank sends (K-1) b (9216 + 4096 + classes) numbers forward and as many back. A group of one
holds whole layers and exchanges nothing: that is data parallelism.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from horovod_owt.model.dropout import keep_scale
from horovod_owt.parallel import autograd
from horovod_owt.parallel.batch_norm import UnitNorm
from horovod_owt.parallel.exchange import Exchange, Slice, split_sizes
from horovod_owt.parallel.flat_gradients import FlatGradients
from horovod_owt.parallel.groups import Group
from horovod_owt.parallel.products import times_weight, times_weight_back
from horovod_owt.parallel.traffic import Completed, Traffic, Transfer


@dataclass(frozen=True)
class _Part:
    """This rank's part of a linear layer."""

    weight: nn.Parameter
    bias: nn.Parameter


class SplitClassifier:
    """This rank's part of AlexNet-OWT's classifier, with explicit forward and backward passes.

    They are not left to autograd in order to control their order: a transfer starts as soon as its values are
    ready, and weight gradients, for which nothing waits, are computed while it is in flight.
    """

    def __init__(
        self,
        classifier: nn.Sequential,
        exchange: Exchange,
        *,
        dropout: float,
        label_smoothing: float,
        dtype: torch.dtype,
    ) -> None:
        self._exchange = exchange
        self._dropout, self._label_smoothing, self._dtype = dropout, label_smoothing, dtype
        self.slices: dict[str, Slice] = {}  # of the tensors that are split, by their names in `classifier`
        self.parameters: dict[str, nn.Parameter] = {}
        self.buffers: dict[str, Tensor] = {}
        self.norms: list[UnitNorm] = []
        named = list(classifier.named_children())
        (n6, fc6), (n7, fc7), (n8, fc8) = [(n, m) for n, m in named if isinstance(m, nn.Linear)]
        self._kept = fc6.weight.dtype  # dtype of weights, sums and losses
        self._units6, units7, classes = (self._own(fc.out_features) for fc in (fc6, fc7, fc8))
        self._classes = classes
        self._fc6 = self._take_linear(n6, fc6, Slice(0, self._units6), Slice(0, self._units6))
        self._fc7 = self._take_linear(n7, fc7, Slice(1, self._units6), Slice(0, units7))
        self._fc8 = self._take_linear(n8, fc8, Slice(1, units7), Slice(0, classes))
        norms = [(n, m) for n, m in named if isinstance(m, nn.BatchNorm1d)]
        for (name, module), units in zip(norms, (self._units6, units7), strict=False):
            self._take_norm(name, module, Slice(0, units))
        self._casts: dict[nn.Parameter, Tensor] = {}

    def synchronize_norms(self, group: Group, traffic: Traffic) -> None:
        """Compute batch statistics over all ranks; `group` is the ranks that hold the same units."""
        for number, norm in enumerate(self.norms, start=6):
            norm.over = (group, traffic, f"sync_bn.fc{number}")

    def weights_changed(self) -> None:
        """Call after each update: cached copies of the weights in lower precision are out of date."""
        self._casts.clear()

    def end_micro_batch(self) -> None:
        """Update the running statistics with this micro-batch's."""
        for norm in self.norms:
            norm.end_micro_batch()

    @torch.no_grad()
    def forward_backward(
        self,
        features: Tensor,
        labels: Tensor,
        keys: Tensor,
        send_back: Callable[[Tensor], Transfer | Completed],
        gradients: FlatGradients,
        *,
        gradient_factor: float,
        gradient_scale: Tensor | None,
        batches: int,
    ) -> tuple[Tensor, Transfer | Completed]:
        """One forward and backward pass over R images; every rank of the group must call it.

        Shapes    features (R, 9216), labels (R,), dropout keys (R, 2): the same on every rank of the group;
                  the rows are the batches of `batches` ranks
        Returns   the sum of the losses, the same on all ranks; and the result of `send_back`, called with
                  this rank's contribution to the features' gradient (R, 9216), to be summed over the group
        Gradient  of that sum times `gradient_factor` and, if given, `gradient_scale`, added to `gradients`
        """
        exchange, fc6, fc7, fc8 = self._exchange, self._fc6, self._fc7, self._fc8
        alone = exchange.group.is_alone

        x = features.to(self._dtype)
        z6 = self._times(x, fc6).to(self._kept) + fc6.bias
        h6, inputs6 = self._activate(z6, 0, batches, keep=self._keep(keys))
        x7 = h6.to(self._dtype)
        part7 = self._times(x7, fc7, units_first=not alone)
        z7 = exchange.reduce_scatter_units(part7, "fc7 units").wait() + fc7.bias
        h7, inputs7 = self._activate(z7, 1, batches)
        x8 = h7.to(self._dtype)
        part = self._times(x8, fc8).to(self._kept).contiguous()
        part[:, self._classes.start : self._classes.stop].add_(fc8.bias)
        logits = exchange.allreduce(part, "logits").wait()
        loss, d_logits = self._loss(logits, labels, gradient_factor, gradient_scale)

        d8 = d_logits.to(self._dtype)
        d_h7 = self._times_back(d8, fc8).to(self._kept)
        d_z7 = self._backward_of_activate(h7, inputs7, d_h7, gradients)
        units_back = exchange.allgather_units(d_z7.to(self._dtype), "fc7 units back")
        own_d_logits = d_logits[:, self._classes.start : self._classes.stop]
        gradients.add_sum(fc8.bias, own_d_logits)
        gradients.add_product(fc8.weight, d8, x8)
        gradients.add_sum(fc7.bias, d_z7)
        d7 = units_back.wait()
        d7 = d7 if d7.is_cuda else d7.contiguous()  # cuBLAS takes either order
        d_h6 = self._times_back(d7, fc7).to(self._kept)
        d_z6 = self._backward_of_activate(h6, inputs6, d_h6, gradients)
        d6 = d_z6.to(self._dtype).contiguous()
        features_back = send_back(self._times_back(d6, fc6))
        gradients.add_product(fc7.weight, d7, x7)
        gradients.add_sum(fc6.bias, d_z6)
        gradients.add_product(fc6.weight, d6, x)
        return loss, features_back

    def _times(self, x: Tensor, fc: _Part, *, units_first: bool = False) -> Tensor:
        return times_weight(x, self._cast(fc.weight), units_first=units_first)

    def _times_back(self, d_out: Tensor, fc: _Part) -> Tensor:
        return times_weight_back(d_out, self._cast(fc.weight))

    def _cast(self, weight: nn.Parameter) -> Tensor:
        """The weights in the precision of the pass, converted once per update."""
        if weight not in self._casts:
            self._casts[weight] = weight.detach().to(self._dtype)
        return self._casts[weight]

    def _keep(self, keys: Tensor) -> Tensor | None:
        return keep_scale(keys, 1, self._units6, self._dropout) if self._dropout else None

    def _activate(
        self, z: Tensor, layer: int, batches: int, keep: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Normalisation, ReLU, dropout: the activations, and the tensors to differentiate by."""
        norm = self.norms[layer] if self.norms else None
        with torch.enable_grad():
            inputs = [z.requires_grad_(), *([norm.weight, norm.bias] if norm else [])]
            h = F.relu(norm(z, batches) if norm else z)
            return (h if keep is None else h * keep), inputs

    @staticmethod
    def _backward_of_activate(
        h: Tensor, inputs: list[Tensor], d_h: Tensor, gradients: FlatGradients
    ) -> Tensor:
        d_z, *d_parameters = autograd.gradients(h, inputs, d_h)
        for parameter, gradient in zip(inputs[1:], d_parameters, strict=True):
            gradients.add(parameter, gradient)
        return d_z

    def _loss(
        self, logits: Tensor, labels: Tensor, factor: float, gradient_scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            logits = logits.requires_grad_()
            loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self._label_smoothing)
        scale = loss.new_full((), factor) if gradient_scale is None else gradient_scale.to(loss) * factor
        (d_logits,) = autograd.gradients(loss, [logits], scale)
        return loss.detach(), d_logits

    def _own(self, units: int) -> range:
        sizes, index = split_sizes(units, self._exchange.group.size), self._exchange.group.index
        return range(sum(sizes[:index]), sum(sizes[: index + 1]))

    def _take_linear(self, name: str, whole: nn.Linear, weight: Slice, bias: Slice) -> _Part:
        return _Part(
            self._take_parameter(f"{name}.weight", whole.weight, weight),
            self._take_parameter(f"{name}.bias", whole.bias, bias),
        )

    def _take_norm(self, name: str, whole: nn.BatchNorm1d, units: Slice) -> None:
        parameters = {
            key: self._take_parameter(f"{name}.{key}", parameter, units)
            for key, parameter in whole.named_parameters()
        }
        buffers = dict(whole.named_buffers())
        for key, buffer in buffers.items():
            if buffer.dim():  # num_batches_tracked is a plain number
                self.slices[f"{name}.{key}"] = units
                if not self._exchange.group.is_alone:
                    buffers[key] = units.of(buffer).clone()
            self.buffers[f"{name}.{key}"] = buffers[key]
        self.norms.append(UnitNorm(parameters, buffers, whole))

    def _take_parameter(self, name: str, whole: nn.Parameter, part: Slice) -> nn.Parameter:
        """A copy of this rank's part; a group of one keeps the parameter itself."""
        alone = self._exchange.group.is_alone
        shard = whole if alone else nn.Parameter(part.of(whole.detach()).clone())
        self.slices[name], self.parameters[name] = part, shard
        return shard
