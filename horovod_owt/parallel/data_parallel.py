"""Data parallelism: every rank holds the whole net, gradients are summed while backward still runs."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import horovod.torch as hvd
import torch
from torch import Tensor, nn

from horovod_owt.parallel.collectives import broadcast_tensors, mean_over_ranks
from horovod_owt.parallel.runtime import World

PIECE_ELEMENTS = (
    4 * 2**20
)  # 16 MB of fp32: large enough for the ring's bandwidth, small enough to start early


@dataclass
class _Piece:
    """A stretch of the flat gradient buffer that travels in one allreduce."""

    values: Tensor
    name: str
    waiting_for: int = 0  # parameters whose gradient this step has not delivered yet
    parameters: int = 0
    handle: int | None = None  # of the allreduce under way


class DataParallel:
    """Sums the ranks' gradients into `parameter.grad`, in few large pieces that overlap the backward pass.

    The gradients live in one flat buffer, last layer first, as backward delivers them. Each `parameter.grad`
    is a view of it in the parameter.s memory format: what Horovod sees is contiguous, channels_last or not.

    A step: `scale` the loss of each micro-batch, call `begin_last_backward` before the last backward, then
    `finish`. Gradients are sums over ranks: `scale` divides by ranks and micro-batches beforehand, which
    makes them the mean over the global batch and saves a pass over 61 M numbers.
    """

    name = "data"

    def __init__(
        self, model: nn.Module, world: World, *, accum_steps: int = 1, compression: str = "none"
    ) -> None:
        self.world = world
        self.model = model
        self._loss_divisor = accum_steps * world.size
        self._compress = hvd.Compression.fp16 if compression == "fp16" and world.size > 1 else None
        parameters = [(name, p) for name, p in reversed(list(model.named_parameters())) if p.requires_grad]
        self._flat = torch.zeros(sum(p.numel() for _, p in parameters), device=world.device)
        self._views: dict[nn.Parameter, Tensor] = {}
        self._pieces: list[_Piece] = []
        self._pieces_of: dict[nn.Parameter, list[_Piece]] = {}
        self._lay_out([p for _, p in parameters])
        self._last_backward = False
        self._hooked = [self._watch(p) for _, p in parameters]
        broadcast_tensors({**dict(model.named_parameters()), **dict(model.named_buffers())})

    @property
    def bytes_sent_per_step(self) -> int:
        """Bytes that a rank sends for gradients in one step: 2 (n-1)/n of the buffer, the ring's share."""
        width = 2 if self._compress else self._flat.element_size()
        return round(2 * (self.world.size - 1) / self.world.size * self._flat.numel() * width)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss whose gradients, summed over ranks and micro-batches, are the global batch's mean."""
        return loss / self._loss_divisor

    def zero_grad(self) -> None:
        """Forget the last step's gradients; backward writes fresh ones, so nothing needs to be zeroed."""
        for parameter in self._views:
            parameter.grad = None

    def begin_last_backward(self) -> None:
        """From here on, each piece whose gradients are complete starts to travel."""
        self._last_backward = True
        for piece in self._pieces:
            piece.waiting_for = piece.parameters

    def finish(self) -> float:
        """Wait until every gradient is summed; returns the seconds waited: communication not hidden."""
        start = perf_counter()
        for piece in self._pieces:
            if piece.handle is None:
                continue  # one rank alone has nothing to send
            summed = hvd.synchronize(piece.handle)
            if self._compress:
                piece.values.copy_(summed)
            piece.handle = None
        self._last_backward = False
        return perf_counter() - start

    def average_buffers(self) -> None:
        """Give all ranks the mean of their running statistics (batch norm), so that they evaluate one net."""
        for name, buffer in self.model.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(mean_over_ranks(buffer, f"buffer.{name}"))

    def _lay_out(self, parameters: list[nn.Parameter]) -> None:
        """Give each parameter its stretch of the buffer, and each piece its parameters."""
        for start in range(0, self._flat.numel(), PIECE_ELEMENTS):
            stretch = self._flat[start : start + PIECE_ELEMENTS]
            self._pieces.append(_Piece(stretch, name=f"gradients.{len(self._pieces)}"))
        start = 0
        for parameter in parameters:
            end = start + parameter.numel()
            self._views[parameter] = _view_like(self._flat[start:end], parameter)
            mine = self._pieces[start // PIECE_ELEMENTS : (end - 1) // PIECE_ELEMENTS + 1]
            self._pieces_of[parameter] = mine
            for piece in mine:
                piece.parameters += 1
            start = end

    def _watch(self, parameter: nn.Parameter) -> object:
        """Call `_deliver` as soon as autograd has this parameter's gradient.

        torch 2.0 has no register_post_accumulate_grad_hook: hook the node that accumulates, keep it alive.
        """
        accumulate = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
        accumulate.register_hook(lambda *_: self._deliver(parameter))
        return accumulate

    def _deliver(self, parameter: nn.Parameter) -> None:
        view = self._views[parameter]
        if parameter.grad is not view:  # the first micro-batch: autograd made a fresh tensor
            view.copy_(parameter.grad)
            parameter.grad = view
        if not self._last_backward:
            return
        for piece in self._pieces_of[parameter]:
            piece.waiting_for -= 1
            if piece.waiting_for == 0 and self.world.size > 1:
                self._send(piece)

    def _send(self, piece: _Piece) -> None:
        wire = self._compress.compress(piece.values)[0] if self._compress else piece.values
        piece.handle = hvd.allreduce_async_(wire, op=hvd.Sum, name=piece.name)


def _view_like(flat: Tensor, parameter: Tensor) -> Tensor:
    """`flat` in the shape and memory format of `parameter`, sharing its memory."""
    if parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        out_channels, in_channels, height, width = parameter.shape
        return flat.view(out_channels, height, width, in_channels).permute(0, 3, 1, 2)
    return flat.view(parameter.shape)
