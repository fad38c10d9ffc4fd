"""Gradients in one flat buffer, summed over ranks in a few large buckets while backward runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import horovod.torch as hvd
import torch
from torch import Tensor, nn

from horovod_owt.parallel.compression import Compressor
from horovod_owt.parallel.groups import Group
from horovod_owt.parallel.products import weight_gradient
from horovod_owt.parallel.traffic import Traffic, Transfer, start_sum
from horovod_owt.perf.predict import bucket_elements


@dataclass
class _Bucket:
    """A range of the flat buffer that is sent in one allreduce, or by a compressor."""

    values: Tensor
    name: str
    compressor: Compressor | None = None  # if set, the range is a matrix
    pending: int = 0  # parameters whose gradients are not ready yet in this step
    parameters: int = 0
    transfer: Transfer | None = None


@dataclass
class _Layout:
    """The buckets in which the buffer is sent."""

    buckets: list[_Bucket] = field(default_factory=list)
    by_parameter: dict[nn.Parameter, list[_Bucket]] = field(default_factory=dict)

    def assign(self, parameter: nn.Parameter, buckets: list[_Bucket]) -> None:
        self.by_parameter[parameter] = buckets
        for bucket in buckets:
            bucket.parameters += 1


class FlatGradients:
    """Sums the gradients of some parameters over the ranks of a group, into `parameter.grad`.

    The buffer holds them in the order in which backward produces them, last layer first. Each
    `parameter.grad` is a view of it in the parameter's memory format, so Horovod gets contiguous memory,
    channels_last or not.

    A step: `begin_step`; in each backward pass autograd hooks (`register_hooks`) or the caller (`add`)
    deliver each parameter's gradient once; `begin_last_backward` before the last pass; then `finish`.
    Gradients are sums: for a mean the caller divides the loss beforehand, which saves a pass over the buffer.

    fp16 compression, or the `compressors` of some matrices, apply in steps in which `compresses` is true.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        group: Group,
        traffic: Traffic,
        *,
        name: str,
        compression: str = "none",
        compressors: Mapping[nn.Parameter, Compressor] | None = None,
    ) -> None:
        self._parameters = list(reversed(parameters))
        self._group, self._traffic, self._name = group, traffic, name
        self._to_16_bits = hvd.Compression.fp16 if compression == "fp16" else None
        self.compresses = True
        self._flat = self._parameters[0].new_zeros(sum(p.numel() for p in self._parameters))
        self._views, self._ranges = self._assign_ranges()
        compressors = compressors or {}
        self._equal_layout = self._equal_buckets()
        self._compressed_layout = (
            self._one_bucket_per_parameter(compressors) if compressors else self._equal_layout
        )
        self._layout = self._equal_layout
        self._in_last_backward = False
        self._hooked_nodes: list[object] = []

    def register_hooks(self) -> None:
        """Take each gradient from autograd as soon as it is accumulated.

        torch 2.0 has no register_post_accumulate_grad_hook: hook the accumulation node and keep it alive.
        """
        for parameter in self._parameters:
            accumulate = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
            accumulate.register_hook(lambda *_, parameter=parameter: self._take(parameter))
            self._hooked_nodes.append(accumulate)

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Deliver a gradient that the caller computed."""
        if parameter.grad is None:
            self._views[parameter].copy_(gradient)
        else:
            parameter.grad.add_(gradient)
        self._ready(parameter)

    def add_product(self, weight: nn.Parameter, d_out: Tensor, x: Tensor) -> None:
        """Deliver d_out^T x, a linear layer's weight gradient; if dtypes match, without a whole copy."""
        if d_out.dtype != self._flat.dtype:
            return self.add(weight, d_out.t() @ x)
        weight_gradient(d_out, x, self._views[weight], add=weight.grad is not None)
        self._ready(weight)

    def add_sum(self, bias: nn.Parameter, d_out: Tensor) -> None:
        """Deliver the sum of d_out over rows, a bias gradient; if dtypes match, computed in the buffer."""
        if bias.grad is not None or d_out.dtype != self._flat.dtype:
            return self.add(bias, d_out.sum(dim=0))
        torch.sum(d_out, dim=0, out=self._views[bias])
        self._ready(bias)

    def begin_step(self) -> None:
        """Discard the last step's gradients; the first new ones overwrite them without zeroing."""
        self._in_last_backward = False
        for parameter in self._parameters:
            parameter.grad = None

    def begin_last_backward(self) -> None:
        """From here on, each bucket is sent as soon as its gradients are complete."""
        self._in_last_backward = True
        self._layout = self._compressed_layout if self.compresses else self._equal_layout
        for bucket in self._layout.buckets:
            bucket.pending = bucket.parameters

    def finish(self) -> None:
        """Wait until every gradient is the group's sum."""
        compressed = [bucket for bucket in self._layout.buckets if bucket.compressor is not None]
        for bucket in compressed:
            bucket.compressor.advance()
        for bucket in self._layout.buckets:
            if bucket.transfer is not None:
                summed = bucket.transfer.wait()
                if summed.dtype != bucket.values.dtype:
                    bucket.values.copy_(summed)
                bucket.transfer = None
        for bucket in compressed:
            bucket.compressor.finish(bucket.values)

    def scale(self, factor: float) -> None:
        """Multiply the gradients, after `finish`."""
        self._flat.mul_(factor)

    def _assign_ranges(self) -> tuple[dict[nn.Parameter, Tensor], dict[nn.Parameter, range]]:
        """Each parameter's view of the buffer, and its range in it."""
        start, views, ranges = 0, {}, {}
        for parameter in self._parameters:
            end = start + parameter.numel()
            views[parameter] = _view_like(self._flat[start:end], parameter)
            ranges[parameter] = range(start, end)
            start = end
        return views, ranges

    def _equal_buckets(self) -> _Layout:
        layout, total = _Layout(), 0 if self._group.is_alone else self._flat.numel()
        length = bucket_elements(self._flat.numel())
        for start in range(0, total, length):
            name = f"{self._name}.{len(layout.buckets)}"
            layout.buckets.append(_Bucket(self._flat[start : start + length], name))
        for parameter, place in self._ranges.items():
            layout.assign(parameter, layout.buckets[place.start // length : (place.stop - 1) // length + 1])
        return layout

    def _one_bucket_per_parameter(self, compressors: Mapping[nn.Parameter, Compressor]) -> _Layout:
        layout = _Layout()
        for parameter in self._parameters:
            compressor = compressors.get(parameter)
            if compressor is None and self._group.is_alone:
                continue
            bucket = _Bucket(self._views[parameter], f"{self._name}.{len(layout.buckets)}", compressor)
            layout.buckets.append(bucket)
            layout.assign(parameter, [bucket])
        return layout

    def _take(self, parameter: nn.Parameter) -> None:
        view = self._views[parameter]
        if parameter.grad is not view:  # the first micro-batch: autograd made a fresh tensor
            view.copy_(parameter.grad)
        self._ready(parameter)

    def _ready(self, parameter: nn.Parameter) -> None:
        parameter.grad = self._views[parameter]
        if not self._in_last_backward:
            return
        for bucket in self._layout.by_parameter.get(parameter, ()):
            bucket.pending -= 1
            if bucket.pending == 0:
                self._send(bucket)

    def _send(self, bucket: _Bucket) -> None:
        if bucket.compressor is not None:
            return bucket.compressor.start(bucket.values)
        to_16_bits = self._to_16_bits if self.compresses else None
        wire = to_16_bits.compress(bucket.values)[0] if to_16_bits else bucket.values
        bucket.transfer = start_sum(
            wire, self._group, self._traffic, what=self._name, name=bucket.name, in_place=True
        )


def _view_like(flat: Tensor, parameter: Tensor) -> Tensor:
    """`flat` in the shape and memory format of `parameter`, sharing its memory."""
    if parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        out_channels, in_channels, height, width = parameter.shape
        return flat.view(out_channels, height, width, in_channels).permute(0, 3, 1, 2)
    return flat.view(parameter.shape)
