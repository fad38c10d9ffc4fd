"""PowerSGD: gradients as products of two thin matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from horovod_owt.parallel.exchange import Exchange
from horovod_owt.parallel.products import times_weight, times_weight_back, weight_gradient


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis whose span contains the columns; it has as many vectors as there are columns."""
    return torch.linalg.qr(columns).Q


class LowRank:
    """The sum over ranks of one matrix M (m, n), as P Q^T of rank r.

    One step of subspace iteration: P = M Q with the Q of the last step, summed and orthonormalised, then
    Q = M^T P, summed. Each rank adds the error of its own contribution to its next gradient.

    Source    Vogels, Karimireddy and Jaggi 2019, arXiv:1905.13727, algorithms 1 and 2; like torch's
              powerSGD_hook it orthonormalises Q before use, which leaves the span of P unchanged
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
        p = times_weight(orthonormal(self.query).t(), self.error.add_(gradient)).t().contiguous()
        self._transfer = self._exchange.allreduce(p, self._what, f"{self._name}.P")

    def advance(self) -> None:
        self._p = orthonormal(self._transfer.wait())
        q = times_weight_back(self._p.t(), self.error).t().contiguous()
        self._transfer = self._exchange.allreduce(q, self._what, f"{self._name}.Q")

    def finish(self, total: Tensor) -> None:
        self.query.copy_(self._transfer.wait())
        weight_gradient(self._p.t(), self.query.t(), total)
        self.error.sub_(total, alpha=1 / self._exchange.group.size)
