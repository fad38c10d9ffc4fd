"""Gradients in one bit: signs, and for each row the means of what is positive and what is negative.

A row of n numbers travels as n bits, padded to whole bytes, and its two means. What a row loses is kept by
the one who sent it, and added to the next row that it sends: error feedback.

Source    Seide et al. 2014, Interspeech, "1-bit stochastic gradient descent", sections 2 and 3
"""

from __future__ import annotations

import torch
from torch import Tensor

from horovod_owt.compression import one_bit_row_bytes
from horovod_owt.parallel.exchange import Exchange, split_sizes

MAX_BLOCK = 2**18  # numbers that are quantised at a time on a CPU: they fit its caches
# Multiplying eight bytes of 0 or 1, read as one number, by PACK moves byte i to bit i of the highest byte.
# SPREAD copies a byte eight times, EACH_BIT keeps bit i of copy i.
PACK, SPREAD, EACH_BIT = 0x0102040810204080, 0x0101010101010101, 0x8040201008040201 - 2**64


def quantise_(values: Tensor) -> Tensor:
    """Rows for the network (m, bytes of a row), uint8; `values` (m, n) becomes what they lose."""
    rows, columns = values.shape
    wire = torch.empty(
        rows, one_bit_row_bytes(columns, values.element_size()), dtype=torch.uint8, device=values.device
    )
    block = max(1, rows) if values.device.type == "cuda" else max(1, MAX_BLOCK // columns)
    for part, sent in zip(values.split(block), wire.split(block), strict=True):
        _quantise_block_(part, sent)
    return wire


def _quantise_block_(values: Tensor, wire: Tensor) -> None:
    positive = values >= 0
    count = positive.sum(dim=1, dtype=torch.int32)
    of_positive = values.clamp(min=0).sum(dim=1)
    of_negative = values.clamp(max=0).sum(dim=1)
    means = torch.stack(
        [of_positive / count.clamp(min=1), of_negative / (values.shape[1] - count).clamp(min=1)], dim=1
    )
    values.sub_(torch.where(positive, means[:, :1], means[:, 1:]))
    bits = pack(positive)
    wire[:, : bits.shape[1]] = bits
    wire[:, bits.shape[1] :] = means.view(torch.uint8)


def dequantise(wire: Tensor, columns: int, dtype: torch.dtype, out: Tensor, *, add: bool = False) -> Tensor:
    """The numbers (m, columns) that the rows stand for, in `out`, or added to it."""
    block = max(1, len(wire)) if wire.device.type == "cuda" else max(1, MAX_BLOCK // columns)
    num_bytes = -(-columns // 8)
    for sent, part in zip(wire.split(block), out.split(block), strict=True):
        means = sent[:, num_bytes:].clone(memory_format=torch.contiguous_format).view(dtype)  # aligned
        numbers = torch.where(unpack(sent[:, :num_bytes], columns), means[:, :1], means[:, 1:])
        if add:
            part.add_(numbers)
        else:
            part.copy_(numbers)
    return out


def pack(bits: Tensor) -> Tensor:
    """Eight booleans a byte, the first one lowest: (m, n) -> (m, n / 8, rounded up), uint8."""
    missing = -bits.shape[1] % 8
    padded = torch.nn.functional.pad(bits, (0, missing)) if missing else bits
    return ((padded.contiguous().view(torch.int64) * PACK) >> 56).to(torch.uint8)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack`: (m, bytes) -> (m, columns)."""
    bits = (packed.to(torch.int64) * SPREAD) & EACH_BIT
    return bits.view(torch.uint8).view(len(packed), -1)[:, :columns] != 0


class OneBit:
    """The sum over ranks of one matrix, in one bit for each number and direction.

    Each rank owns a share of the rows: it receives these from all ranks, sums them, and sends the sum to all,
    again in one bit. So errors are made twice, and kept by who makes them: each rank has one of all rows that
    it sends, and an owner one of the sums.
    """

    def __init__(self, matrix: Tensor, exchange: Exchange, *, what: str, name: str) -> None:
        self._exchange, self._what, self._name = exchange, what, name
        self.sizes = split_sizes(len(matrix), exchange.group.size)  # rows of each owner
        self.error = torch.zeros_like(matrix)  # of this rank
        self.owner_error = matrix.new_zeros(self.sizes[exchange.group.index], matrix.shape[1])

    def start(self, gradient: Tensor) -> None:
        rows = quantise_(self.error.add_(gradient))
        self._transfer = self._exchange.to_owners(rows, self.sizes, self._what, f"{self._name}.to owners")

    def turn(self) -> None:
        arrived = self._transfer.wait()
        columns, total = self.error.shape[1], self.owner_error
        for rows in arrived.chunk(self._exchange.group.size) if len(total) else ():
            dequantise(rows, columns, total.dtype, total, add=True)
        self._transfer = self._exchange.gather_rows(quantise_(total), self._what, f"{self._name}.to all")

    def finish(self, total: Tensor) -> None:
        dequantise(self._transfer.wait(), total.shape[1], total.dtype, total)
