"""Gradients in one flat buffer, summed over ranks in a few large pieces while backward runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import horovod.torch as hvd
import torch
from torch import Tensor, nn

from horovod_owt.parallel.groups import Group
from horovod_owt.parallel.traffic import Traffic, Transfer, start_sum

MAX_PIECE_ELEMENTS = 4 * 2**20  # 16 MB of fp32: large enough to reach the ring's bandwidth
MIN_PIECES = 4  # of a small buffer, so that most of it is sent before the first layer's gradient is ready


@dataclass
class _Piece:
    """A range of the flat buffer that is sent in one allreduce."""

    values: Tensor
    name: str
    waiting_for: int = 0  # parameters whose gradients are not ready yet in this step
    parameters: int = 0
    transfer: Transfer | None = None


class FlatGradients:
    """Sums the gradients of some parameters over the ranks of a group, into `parameter.grad`.

    The buffer holds them in the order in which backward produces them, last layer first. Each
    `parameter.grad` is a view of it in the parameter's memory format, so Horovod gets contiguous memory,
    channels_last or not.

    A step: `begin_step`; in each backward pass autograd's hooks (`watch`) or the caller (`add`) deliver each
    parameter's gradient once; `begin_last` before the last pass; then `finish`. Gradients are sums: for a
    mean the caller divides the loss beforehand, which saves a pass over the buffer.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        group: Group,
        traffic: Traffic,
        *,
        name: str,
        compression: str = "none",
    ) -> None:
        self._parameters = list(reversed(parameters))
        self._group, self._traffic, self._name = group, traffic, name
        self._compress = hvd.Compression.fp16 if compression == "fp16" and not group.is_alone else None
        self._flat = self._parameters[0].new_zeros(sum(p.numel() for p in self._parameters))
        self._views: dict[nn.Parameter, Tensor] = {}
        self._pieces: list[_Piece] = []
        self._pieces_of: dict[nn.Parameter, list[_Piece]] = {}
        self._lay_out()
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
        for piece in self._pieces:
            piece.waiting_for = piece.parameters

    def finish(self) -> None:
        """Wait until every gradient is the group's sum."""
        for piece in self._pieces:
            if piece.transfer is not None:
                summed = piece.transfer.wait()
                if self._compress:
                    piece.values.copy_(summed)
                piece.transfer = None

    def scale(self, factor: float) -> None:
        """Multiply the gradients, after `finish`."""
        self._flat.mul_(factor)

    def _lay_out(self) -> None:
        """Assign each parameter its range of the buffer, and each piece its parameters."""
        total = self._flat.numel()
        length = min(MAX_PIECE_ELEMENTS, -(-total // MIN_PIECES))
        for start in range(0, total, length):
            name = f"{self._name}.{len(self._pieces)}"
            self._pieces.append(_Piece(self._flat[start : start + length], name))
        start = 0
        for parameter in self._parameters:
            end = start + parameter.numel()
            self._views[parameter] = _view_like(self._flat[start:end], parameter)
            mine = self._pieces[start // length : (end - 1) // length + 1]
            self._pieces_of[parameter] = mine
            for piece in mine:
                piece.parameters += 1
            start = end

    def _take(self, parameter: nn.Parameter) -> None:
        view = self._views[parameter]
        if parameter.grad is not view:  # the first micro-batch: autograd made a fresh tensor
            view.copy_(parameter.grad)
        self._ready(parameter)

    def _ready(self, parameter: nn.Parameter) -> None:
        parameter.grad = self._views[parameter]
        if not self._last or self._group.is_alone:
            return
        for piece in self._pieces_of[parameter]:
            piece.waiting_for -= 1
            if piece.waiting_for == 0:
                self._send(piece)

    def _send(self, piece: _Piece) -> None:
        wire = self._compress.compress(piece.values)[0] if self._compress else piece.values
        piece.transfer = start_sum(
            wire, self._group, self._traffic, what=self._name, name=piece.name, in_place=True
        )


def _view_like(flat: Tensor, parameter: Tensor) -> Tensor:
    """`flat` in the shape and memory format of `parameter`, sharing its memory."""
    if parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        out_channels, in_channels, height, width = parameter.shape
        return flat.view(out_channels, height, width, in_channels).permute(0, 3, 1, 2)
    return flat.view(parameter.shape)
