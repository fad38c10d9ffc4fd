"""Gradients as products of two thin matrices: PowerSGD."""

from __future__ import annotations

import torch
from torch import Tensor

from horovod_owt.parallel.exchange import Exchange


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the space of the columns; of as many dimensions if some depend on others."""
    return torch.linalg.qr(columns).Q


class LowRank:
    """The sum over ranks of one matrix M (m, n), as P Q^T of rank r.

    One step of subspace iteration: P = M Q with the Q of the step before, summed and orthonormalised, then
    Q = M^T P, summed. Each rank adds the error of its own part of the last sum to its next gradient.

    Source    Vogels, Karimireddy and Jaggi 2019, arXiv:1905.13727, algorithms 1 and 2; as torch's
              powerSGD_hook, Q is orthonormalised before use, which leaves the space of P unchanged
    """

    def __init__(
        self, matrix: Tensor, exchange: Exchange, *, rank: int, what: str, name: str, seed: int
    ) -> None:
        self._exchange, self._what, self._name = exchange, what, name
        rows, columns = matrix.shape
        draw = torch.Generator().manual_seed(seed)  # the same on all ranks
        self.query = torch.randn(columns, min(rank, rows, columns), generator=draw).to(matrix)
        self.error = torch.zeros_like(matrix)  # of this rank

    def start(self, gradient: Tensor) -> None:
        p = self.error.add_(gradient) @ orthonormal(self.query)
        self._transfer = self._exchange.sum_everywhere(p, self._what, f"{self._name}.P")

    def turn(self) -> None:
        self._p = orthonormal(self._transfer.wait())
        self._transfer = self._exchange.sum_everywhere(
            self.error.t() @ self._p, self._what, f"{self._name}.Q"
        )

    def finish(self, total: Tensor) -> None:
        self.query.copy_(self._transfer.wait())
        torch.mm(self._p, self.query.t(), out=total)
        self.error.sub_(total, alpha=1 / self._exchange.group.size)
