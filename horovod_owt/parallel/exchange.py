"""Collectives on features, hidden units and their gradients inside an fc_group.

Each forward collective has its transpose in the backward pass: an allgather becomes a reduce-scatter and vice
versa. (`hvd.allgather`'s own backward averages, which would lose a factor of the group size.)

    forward                                            backward
    allgather_rows        (b, n) -> (K*b, n)           reduce_scatter_rows  (K*b, n) -> (b, n)
    reduce_scatter_units  (R, n) -> (R, n_own)         allgather_units      (R, n_own) -> (R, n)
    allreduce             (R, n) -> (R, n)             none: every rank of the group has the whole gradient
    broadcast_rows        the owner's (b, n) -> (b, n)     reduce_rows      (b, n) -> (b, n) at the owner

Compressed gradients use `alltoall_rows`, `allgather_rows` and `allreduce`. `what` is the counter of the
bytes; `name`, by default the same, is Horovod's name for the tensor, and differs between tensors in flight.

Reductions are an alltoall of the parts and an fp32 addition at their owner, not Gloo's reduce-scatter: the
same bytes, but 2.7 instead of 14.4 ms for 2 x 32 x 9216 numbers. This also allows bf16: Horovod's CPU
collectives reject bf16 tensors, but a transfer without arithmetic can send them as 16-bit words.
"""

from __future__ import annotations

from dataclasses import dataclass

import horovod.torch as hvd
import torch
from torch import Tensor

from horovod_owt.parallel.groups import Group
from horovod_owt.parallel.traffic import Completed, Traffic, Transfer, bytes_of, start_sum
from horovod_owt.perf.network import share


@dataclass(frozen=True)
class Slice:
    """The part of a tensor that a weight shard holds: `units` along `dim`."""

    dim: int
    units: range

    def of(self, whole: Tensor) -> Tensor:
        return whole.narrow(self.dim, self.units.start, len(self.units))


def split_sizes(units: int, parts: int) -> list[int]:
    """How many of `units` each rank of a group holds."""
    return [share(units, parts, part) for part in range(parts)]


class Exchange:
    """The collectives of a group of K ranks. All K must start each of them, in the same order."""

    def __init__(self, group: Group, traffic: Traffic) -> None:
        self.group = group
        self._traffic = traffic

    def allgather_rows(self, own: Tensor, what: str, name: str = "") -> Transfer | Completed:
        """Every rank's rows, in group order: (b, n) -> (K*b, n); b is the same on all ranks."""
        if self.group.is_alone:
            return Completed(own)
        return self._allgather(own, what, name)

    def alltoall_rows(self, rows: Tensor, sizes: list[int], what: str, name: str) -> Transfer | Completed:
        """Send `sizes[i]` of the rows to index i; returns the rows received, in group order."""
        if self.group.is_alone:
            return Completed(rows)
        return self._alltoall(rows, sizes, what, name).then(lambda arrived: arrived[0])

    def reduce_scatter_rows(self, parts: Tensor, what: str) -> Transfer | Completed:
        """This rank's rows of the sum of all ranks' (K*b, n): (b, n) in fp32."""
        if self.group.is_alone:
            return Completed(parts)
        rows = parts.shape[0] // self.group.size
        return self._sum_by_alltoall(parts, [rows] * self.group.size, what)

    def reduce_scatter_units(self, parts: Tensor, what: str) -> Transfer | Completed:
        """This rank's columns of the sum of all ranks' (R, n): (R, n_own) in fp32."""
        if self.group.is_alone:
            return Completed(parts)
        sizes = split_sizes(parts.shape[1], self.group.size)
        summed = self._sum_by_alltoall(parts.t(), sizes, what)
        return summed.then(Tensor.t)

    def allgather_units(self, own: Tensor, what: str) -> Transfer | Completed:
        """Every rank's columns side by side: (R, n_own) -> (R, n)."""
        if self.group.is_alone:
            return Completed(own)
        return self._allgather(own.t(), what).then(Tensor.t)

    def allreduce(self, parts: Tensor, what: str, name: str = "") -> Transfer | Completed:
        """The sum of all ranks' fp32 `parts`, on every rank."""
        return start_sum(parts, self.group, self._traffic, what=what, name=name or what)

    def broadcast_rows(self, own: Tensor, owner: int, what: str) -> Transfer | Completed:
        """The rows of index `owner`, on every rank; the other ranks' `own` gives shape and dtype."""
        if self.group.is_alone:
            return Completed(own)
        wire, back = _as_words(own)
        if owner == self.group.index:
            self._traffic.count(what, sent=bytes_of(wire) * (self.group.size - 1), received=0)
        else:
            self._traffic.count(what, sent=0, received=bytes_of(wire))
        handle = hvd.broadcast_async(
            wire,
            root_rank=self.group.ranks[owner],
            name=f"{what}.{owner}",
            process_set=self.group.process_set,
        )
        return Transfer(handle, self._traffic, what, back)

    def reduce_rows(self, parts: Tensor, owner: int, what: str) -> Transfer | Completed:
        """The sum of all ranks' (b, n), in fp32, at index `owner`; no rows elsewhere."""
        if self.group.is_alone:
            return Completed(parts)
        sizes = [parts.shape[0] if index == owner else 0 for index in range(self.group.size)]
        return self._sum_by_alltoall(parts, sizes, what, turn=owner)

    def gather_whole(self, shard: Tensor, part: Slice | None) -> Tensor:
        """The whole tensor, from the parts that the group's ranks hold; `shard` itself if it is not split."""
        if part is None or self.group.is_alone:
            return shard
        if part.dim == 0:
            return self._allgather(shard, "whole tensors").wait()
        # Sent in memory order and reassembled afterwards: transposing first takes longer than the transfer.
        everyones = self._allgather(shard.reshape(-1), "whole tensors").wait()
        unit_numel = shard.numel() // len(part.units)
        sizes = split_sizes(everyones.numel() // unit_numel, self.group.size)
        pieces = everyones.split([units * unit_numel for units in sizes])
        shapes = [[*shard.shape[: part.dim], units, *shard.shape[part.dim + 1 :]] for units in sizes]
        return torch.cat([p.view(shape) for p, shape in zip(pieces, shapes, strict=True)], dim=part.dim)

    def _allgather(self, own: Tensor, what: str, name: str = "") -> Transfer:
        wire, back = _as_words(own.contiguous())
        handle = hvd.allgather_async(wire, name=name or what, process_set=self.group.process_set)

        def count(gathered: Tensor) -> Tensor:
            sent = bytes_of(wire) * (self.group.size - 1)
            self._traffic.count(what, sent=sent, received=bytes_of(gathered) - bytes_of(wire))
            return back(gathered)

        return Transfer(handle, self._traffic, what, count)

    def _sum_by_alltoall(self, parts: Tensor, sizes: list[int], what: str, turn: int = 0) -> Transfer:
        """Send `sizes[i]` rows of `parts` to index i, which adds up what it receives from all ranks."""
        size, mine = self.group.size, sizes[self.group.index]
        wire, back = _as_words(parts.contiguous())

        def add_up(arrived: tuple[Tensor, Tensor]) -> Tensor:
            parts = back(arrived[0]).view(size, mine, *wire.shape[1:])
            return parts.sum(dim=0, dtype=torch.float32 if parts.element_size() == 2 else None)

        return self._alltoall(wire, sizes, what, f"{what}.{turn}").then(add_up)

    def _alltoall(self, wire: Tensor, sizes: list[int], what: str, name: str) -> Transfer:
        """Send `sizes[i]` rows to index i. The result is Horovod's: the rows received, and their splits."""
        size, mine = self.group.size, sizes[self.group.index]
        row_bytes = bytes_of(wire) // max(1, len(wire))
        self._traffic.count(what, sent=(len(wire) - mine) * row_bytes, received=(size - 1) * mine * row_bytes)
        handle = hvd.alltoall_async(
            wire,
            splits=torch.tensor(sizes, dtype=torch.int32),
            name=name,
            process_set=self.group.process_set,
        )
        return Transfer(handle, self._traffic, what)


def _as_words(tensor: Tensor):
    """`tensor` as Horovod accepts it, and the inverse: bf16 is sent bit for bit, labelled as fp16."""
    if tensor.dtype != torch.bfloat16:
        return tensor, lambda words: words
    return tensor.view(torch.float16), lambda words: words.view(torch.bfloat16)
