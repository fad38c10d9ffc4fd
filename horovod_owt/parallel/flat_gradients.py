"""Gradients in one flat buffer, summed over ranks in a few large pieces while backward runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import horovod.torch as hvd
import torch
from torch import Tensor, nn

from horovod_owt.parallel.compression import Compressor
from horovod_owt.parallel.groups import Group
from horovod_owt.parallel.traffic import Traffic, Transfer, start_sum
from horovod_owt.perf.predict import piece_elements


@dataclass
class _Piece:
    """A range of the flat buffer that is sent in one allreduce, or by a compressor."""

    values: Tensor
    name: str
    compressor: Compressor | None = None  # then the range is a matrix
    waiting_for: int = 0  # parameters whose gradients are not ready yet in this step
    parameters: int = 0
    transfer: Transfer | None = None


@dataclass
class _Layout:
    """The pieces in which the buffer is sent."""

    pieces: list[_Piece] = field(default_factory=list)
    of: dict[nn.Parameter, list[_Piece]] = field(default_factory=dict)

    def assign(self, parameter: nn.Parameter, pieces: list[_Piece]) -> None:
        self.of[parameter] = pieces
        for piece in pieces:
            piece.parameters += 1


class FlatGradients:
    """Sums the gradients of some parameters over the ranks of a group, into `parameter.grad`.

    The buffer holds them in the order in which backward produces them, last layer first. Each
    `parameter.grad` is a view of it in the parameter's memory format, so Horovod gets contiguous memory,
    channels_last or not.

    A step: `begin_step`; in each backward pass autograd's hooks (`watch`) or the caller (`add`) deliver each
    parameter's gradient once; `begin_last` before the last pass; then `finish`. Gradients are sums: for a
    mean the caller divides the loss beforehand, which saves a pass over the buffer.

    With compression the 16-bit floats, or the `compressors` of some matrices, are used in the steps in which
    `compresses` is true.
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
        self._whole = self._in_equal_pieces()
        self._compressed = self._in_matrices(compressors) if compressors else self._whole
        self._layout = self._whole
        self._last = False
        self._hooked: list[object] = []

    def watch(self) -> None:
        """Take each gradient from autograd as soon as it is accumulated.

        torch 2.0 has no register_post_accumulate_grad_hook: hook the accumulation node and keep it alive.
        """
        for parameter in self._parameters:
            accumulate = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
            accumulate.register_hook(lambda *_, parameter=parameter: self._take(parameter))
            self._hooked.append(accumulate)

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Deliver a gradient that the caller computed."""
        if parameter.grad is None:
            self._views[parameter].copy_(gradient)
        else:
            parameter.grad.add_(gradient)
        self._ready(parameter)

    def add_product(self, weight: nn.Parameter, d_out: Tensor, x: Tensor) -> None:
        """Deliver d_out^T x, a linear layer's gradient; in fp32 it is computed in the buffer itself."""
        if d_out.dtype != self._flat.dtype:
            return self.add(weight, d_out.t() @ x)
        if weight.grad is None:
            torch.mm(d_out.t(), x, out=self._views[weight])
        else:
            weight.grad.addmm_(d_out.t(), x)
        self._ready(weight)

    def add_sum(self, bias: nn.Parameter, d_out: Tensor) -> None:
        """Deliver the sum over rows, a bias' gradient; in its own dtype it is computed in the buffer."""
        if bias.grad is not None or d_out.dtype != self._flat.dtype:
            return self.add(bias, d_out.sum(dim=0))
        torch.sum(d_out, dim=0, out=self._views[bias])
        self._ready(bias)

    def begin_step(self) -> None:
        """Discard the last step's gradients; the first new ones overwrite them, nothing is zeroed."""
        self._last = False
        for parameter in self._parameters:
            parameter.grad = None

    def begin_last(self) -> None:
        """From here on, each piece is sent as soon as its gradients are complete."""
        self._last = True
        self._layout = self._compressed if self.compresses else self._whole
        for piece in self._layout.pieces:
            piece.waiting_for = piece.parameters

    def finish(self) -> None:
        """Wait until every gradient is the group's sum."""
        compressed = [piece for piece in self._layout.pieces if piece.compressor is not None]
        for piece in compressed:
            piece.compressor.turn()
        for piece in self._layout.pieces:
            if piece.transfer is not None:
                summed = piece.transfer.wait()
                if summed.dtype != piece.values.dtype:
                    piece.values.copy_(summed)
                piece.transfer = None
        for piece in compressed:
            piece.compressor.finish(piece.values)

    def scale(self, factor: float) -> None:
        """Multiply the gradients, after `finish`."""
        self._flat.mul_(factor)

    def _assign_ranges(self) -> tuple[dict[nn.Parameter, Tensor], dict[nn.Parameter, range]]:
        """Each parameter's view of the buffer, and where it is."""
        start, views, ranges = 0, {}, {}
        for parameter in self._parameters:
            end = start + parameter.numel()
            views[parameter] = _view_like(self._flat[start:end], parameter)
            ranges[parameter] = range(start, end)
            start = end
        return views, ranges

    def _in_equal_pieces(self) -> _Layout:
        layout, total = _Layout(), 0 if self._group.is_alone else self._flat.numel()
        length = piece_elements(self._flat.numel())
        for start in range(0, total, length):
            name = f"{self._name}.{len(layout.pieces)}"
            layout.pieces.append(_Piece(self._flat[start : start + length], name))
        for parameter, place in self._ranges.items():
            layout.assign(parameter, layout.pieces[place.start // length : (place.stop - 1) // length + 1])
        return layout

    def _in_matrices(self, compressors: Mapping[nn.Parameter, Compressor]) -> _Layout:
        """A piece for each parameter."""
        layout = _Layout()
        for parameter in self._parameters:
            compressor = compressors.get(parameter)
            if compressor is None and self._group.is_alone:
                continue
            piece = _Piece(self._views[parameter], f"{self._name}.{len(layout.pieces)}", compressor)
            layout.pieces.append(piece)
            layout.assign(parameter, [piece])
        return layout

    def _take(self, parameter: nn.Parameter) -> None:
        view = self._views[parameter]
        if parameter.grad is not view:  # the first micro-batch: autograd made a fresh tensor
            view.copy_(parameter.grad)
        self._ready(parameter)

    def _ready(self, parameter: nn.Parameter) -> None:
        parameter.grad = self._views[parameter]
        if not self._last:
            return
        for piece in self._layout.of.get(parameter, ()):
            piece.waiting_for -= 1
            if piece.waiting_for == 0:
                self._send(piece)

    def _send(self, piece: _Piece) -> None:
        if piece.compressor is not None:
            return piece.compressor.start(piece.values)
        to_16_bits = self._to_16_bits if self.compresses else None
        wire = to_16_bits.compress(piece.values)[0] if to_16_bits else piece.values
        piece.transfer = start_sum(
            wire, self._group, self._traffic, what=self._name, name=piece.name, in_place=True
        )


def _view_like(flat: Tensor, parameter: Tensor) -> Tensor:
    """`flat` in the shape and memory format of `parameter`, sharing its memory."""
    if parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        out_channels, in_channels, height, width = parameter.shape
        return flat.view(out_channels, height, width, in_channels).permute(0, 3, 1, 2)
    return flat.view(parameter.shape)
