"""One-bit gradients: the sign of each number, and the means of each row's positive and negative numbers.

A row of n numbers is sent as n bits, padded to whole bytes, and its two means. The sender keeps the
quantisation error and adds it to the next row that it sends: error feedback.

Source    Seide et al. 2014, Interspeech, "1-bit stochastic gradient descent", sections 2 and 3
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from horovod_owt.compression import one_bit_row_bytes
from horovod_owt.parallel.exchange import Exchange, split_sizes

MAX_BLOCK = 2**18  # numbers quantised at a time on a CPU, to fit its caches
# Multiplying eight bytes of 0 or 1, read as one number, by PACK moves byte i to bit i of the highest byte.
# SPREAD copies a byte eight times, EACH_BIT keeps bit i of copy i.
PACK, SPREAD, EACH_BIT = 0x0102040810204080, 0x0101010101010101, 0x8040201008040201 - 2**64


def quantise_(values: Tensor) -> Tensor:
    """`values` (m, n) quantised: (m, bytes per row), uint8; `values` is overwritten by the error."""
    rows, columns = values.shape
    row_bytes = one_bit_row_bytes(columns, values.element_size())
    wire = torch.empty(rows, row_bytes, dtype=torch.uint8, device=values.device)
    for part, sent in _in_blocks(values, wire):
        negative = _negative(part)
        count = negative.sum(dim=1)
        of_positive = part.clamp(min=0).sum(dim=1) / (columns - count).clamp(min=1)
        of_negative = part.clamp(max=0).sum(dim=1) / count.clamp(min=1)
        means = torch.stack([of_positive, of_negative], dim=1)
        part.sub_(_numbers(negative, means))
        bits = pack(negative)
        sent[:, : bits.shape[1]] = bits
        sent[:, bits.shape[1] :] = means.view(torch.uint8)
    return wire


def dequantise(wire: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """Write the numbers that `wire` encodes to `out` (m, n), or add them to it."""
    columns = out.shape[1]
    num_bytes = -(-columns // 8)
    for part, sent in _in_blocks(out, wire):
        means = sent[:, num_bytes:].clone(memory_format=torch.contiguous_format).view(out.dtype)  # aligned
        numbers = _numbers(unpack(sent[:, :num_bytes], columns), means)
        if add:
            part.add_(numbers)
        else:
            part.copy_(numbers)
    return out


def _in_blocks(values: Tensor, wire: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = len(values) if values.is_cuda else MAX_BLOCK // values.shape[1]
    return zip(values.split(max(1, rows)), wire.split(max(1, rows)), strict=True)


def _numbers(negative: Tensor, means: Tensor) -> Tensor:
    """Each number replaced by the mean of its sign, with the same arithmetic at both ends."""
    positive_mean, negative_mean = means[:, :1], means[:, 1:]
    return negative.to(means.dtype).mul_(negative_mean - positive_mean).add_(positive_mean)


# On a CPU numpy is 2 to 20 times as fast as torch at comparing numbers and at packing bits; torch.where
# would take longer than all the rest.


def _negative(values: Tensor) -> Tensor:
    """1 where a number is negative, else 0, as uint8."""
    if values.is_cuda:
        return (values < 0).view(torch.uint8)
    return torch.from_numpy((values.numpy() < 0).view(np.uint8))


def pack(bits: Tensor) -> Tensor:
    """Eight 0/1 values per byte, the first in the lowest bit: uint8 (m, n) -> (m, ceil(n / 8))."""
    if not bits.is_cuda:
        return torch.from_numpy(np.packbits(bits.numpy(), axis=1, bitorder="little"))
    return pack_on_gpu(bits)


def pack_on_gpu(bits: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8))
    return ((padded.view(torch.int64) * PACK) >> 56).to(torch.uint8)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack`: (m, bytes) -> (m, columns)."""
    if not packed.is_cuda:
        return torch.from_numpy(np.unpackbits(packed.numpy(), axis=1, count=columns, bitorder="little"))
    return unpack_on_gpu(packed, columns)


def unpack_on_gpu(packed: Tensor, columns: int) -> Tensor:
    bits = (packed.to(torch.int64) * SPREAD) & EACH_BIT
    return (bits.view(torch.uint8).view(len(packed), -1)[:, :columns] != 0).view(torch.uint8)


class OneBit:
    """The sum over ranks of one matrix, sent in one bit per number in each direction.

    Each rank owns a share of the rows: it receives these from all ranks, sums them, and sends the sum to all,
    again quantised. There are two kinds of error: each rank keeps that of the rows it sends (`error`), and
    each owner that of its sums (`owner_error`).
    """

    def __init__(self, matrix: Tensor, exchange: Exchange, *, what: str, name: str) -> None:
        self._exchange, self._what, self._name = exchange, what, name
        self.sizes = split_sizes(len(matrix), exchange.group.size)  # rows of each owner
        self.error = torch.zeros_like(matrix)  # of this rank
        self.owner_error = matrix.new_zeros(self.sizes[exchange.group.index], matrix.shape[1])

    def start(self, gradient: Tensor) -> None:
        rows = quantise_(self.error.add_(gradient))
        self._transfer = self._exchange.alltoall_rows(rows, self.sizes, self._what, f"{self._name}.to owners")

    def advance(self) -> None:
        arrived = self._transfer.wait()
        total = self.owner_error
        for rows in arrived.chunk(self._exchange.group.size) if len(total) else ():
            dequantise(rows, total, add=True)
        self._transfer = self._exchange.allgather_rows(quantise_(total), self._what, f"{self._name}.to all")

    def finish(self, total: Tensor) -> None:
        dequantise(self._transfer.wait(), total)
