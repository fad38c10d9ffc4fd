"""Compressed sums of FC gradients over all ranks, and their state between steps.

A compressor sends an approximation of its matrix, and adds the error to the next gradient (error feedback):
the sums of all steps plus the errors of all ranks equal the sum of the gradients.

Checkpoints hold every rank's error, so that a resumed run is bitwise the same. On another number of ranks,
each takes an equal share of the sum of the errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from horovod_owt.compression import low_rank_pays, powersgd_rank
from horovod_owt.parallel.exchange import Exchange
from horovod_owt.parallel.low_rank import LowRank
from horovod_owt.parallel.one_bit import OneBit

# Prefixes of a parameter's name in checkpoints and commits.
ERROR = "error."  # in a checkpoint every rank's, stacked in rank order; in a commit their sum
OWNER_ERROR = "owner_error."  # onebit: errors of the sums, each row's kept by the rank that owns it
QUERY = "query."  # powersgd: Q of the last step
PREFIXES = (ERROR, OWNER_ERROR, QUERY)
MAX_ELEMENTS = 2**28  # of all ranks in one transfer: Horovod and MPI count in 32 bits


class Compressor(Protocol):
    """Sums one matrix over the ranks. Every rank calls the three methods once a step, in this order."""

    error: Tensor  # of this rank, in the shape of the matrix

    def start(self, gradient: Tensor) -> None:
        """Start the first transfer."""

    def advance(self) -> None:
        """Wait for the first transfer and start the second."""

    def finish(self, total: Tensor) -> None:
        """Write the sum over the ranks to `total`, the tensor that was passed to `start`."""


class SingleRank:
    """For a job of one rank: nothing is sent, and errors of a larger job are added to the first gradient."""

    def __init__(self, matrix: Tensor) -> None:
        self.error = torch.zeros_like(matrix)

    def start(self, gradient: Tensor) -> None:
        gradient.add_(self.error)
        self.error.zero_()

    def advance(self) -> None:
        pass

    def finish(self, total: Tensor) -> None:
        pass


def build_compressors(
    compression: str, named: Mapping[str, nn.Parameter], exchange: Exchange, *, what: str, seed: int
) -> dict[str, Compressor]:
    """A compressor for each matrix of `named` that gets smaller by it; none for lossless settings."""
    found: dict[str, Compressor] = {}
    rank = powersgd_rank(compression)
    for number, (name, parameter) in enumerate(named.items()):
        is_matrix = parameter.dim() == 2
        if not (is_matrix and (compression == "onebit" or (rank and low_rank_pays(*parameter.shape, rank)))):
            continue
        like, about = parameter.detach(), {"what": what, "name": f"{what}.{name}"}
        if exchange.group.is_alone:
            found[name] = SingleRank(like)
        elif rank:
            found[name] = LowRank(like, exchange, rank=rank, seed=seed + number, **about)
        else:
            found[name] = OneBit(like, exchange, **about)
    return found


class CompressionState:
    """The errors and queries of all compressors, as whole tensors by name, for checkpoints and commits."""

    def __init__(self, compressors: Mapping[str, Compressor], exchange: Exchange) -> None:
        self._compressors, self._exchange, self._group = compressors, exchange, exchange.group

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that `gather` returns."""
        found: dict[str, tuple[int, ...]] = {}
        for name, compressor in self._compressors.items():
            rows, columns = compressor.error.shape
            found[ERROR + name] = (self._group.size * rows, columns)
            if isinstance(compressor, OneBit):
                found[OWNER_ERROR + name] = (rows, columns)
            elif isinstance(compressor, LowRank):
                found[QUERY + name] = tuple(compressor.query.shape)
        return found

    def gather(self) -> dict[str, Tensor]:
        """All ranks' errors, and the queries, on rank 0; empty on the others. Every rank must call it."""
        found = {}
        for name, compressor in self._compressors.items():
            found[ERROR + name] = self._errors_on_root(name, compressor)
            if isinstance(compressor, OneBit):
                found[OWNER_ERROR + name] = self._on_root(compressor.owner_error, f"{OWNER_ERROR}{name}")
            elif isinstance(compressor, LowRank):
                found[QUERY + name] = compressor.query
        return found if self._group.index == 0 else {}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Continue from what `gather` returned, on any number of ranks. Every rank must call it.

        Only rank 0 has `saved`. Errors that it lacks start from zero, Q from its random draw.
        """
        for name, compressor in self._compressors.items():
            shape = compressor.error.shape
            self._errors_from_root(name, compressor, saved)
            if isinstance(compressor, OneBit):
                owners = saved.get(OWNER_ERROR + name, compressor.error.new_zeros(shape))
                whole = self._from_root(owners.to(compressor.error), f"{OWNER_ERROR}{name}")
                compressor.owner_error.copy_(self._own_rows(compressor, whole))
            elif isinstance(compressor, LowRank):
                query = saved.get(QUERY + name, compressor.query)
                query = query if query.shape == compressor.query.shape else compressor.query
                compressor.query.copy_(self._from_root(query.to(compressor.query), f"{QUERY}{name}"))

    def total(self) -> dict[str, Tensor]:
        """The state for an elastic commit, on every rank: errors are summed, because ranks may be lost."""
        found = {}
        for name, compressor in self._compressors.items():
            sent = self._exchange.allreduce(compressor.error, "commit", f"commit.{ERROR}{name}")
            found[ERROR + name] = sent.wait()
            if isinstance(compressor, OneBit):
                sent = self._exchange.allgather_rows(
                    compressor.owner_error, "commit", f"commit.{OWNER_ERROR}{name}"
                )
                found[OWNER_ERROR + name] = sent.wait()
            elif isinstance(compressor, LowRank):
                found[QUERY + name] = compressor.query
        return found

    def restore_total(self, committed: Mapping[str, Tensor]) -> None:
        """Continue from what `total` returned, which every rank has, on any number of ranks."""
        for name, compressor in self._compressors.items():
            compressor.error.copy_(self._shares(name, committed)[self._group.index])
            if isinstance(compressor, OneBit) and OWNER_ERROR + name in committed:
                compressor.owner_error.copy_(self._own_rows(compressor, committed[OWNER_ERROR + name]))
            elif isinstance(compressor, LowRank) and QUERY + name in committed:
                compressor.query.copy_(committed[QUERY + name])

    def _errors_on_root(self, name: str, compressor: Compressor) -> Tensor:
        """All ranks' errors, stacked in rank order, on rank 0; empty on the others."""
        ranks, shape = self._group.size if self._group.index == 0 else 0, compressor.error.shape
        whole = compressor.error.new_empty(ranks, *shape)
        for start, some in self._pieces(compressor.error):
            arrived = self._on_root(some, f"{ERROR}{name}.{start}")
            whole[:, start : start + len(some)] = arrived.view(ranks, *some.shape)
        return whole.view(-1, shape[1])

    def _errors_from_root(self, name: str, compressor: Compressor, saved: Mapping[str, Tensor]) -> None:
        """Send each rank its share of the errors, which only rank 0 has."""
        is_root, columns = self._group.index == 0, compressor.error.shape[1]
        shares = self._shares(name, saved) if is_root else None
        for start, some in self._pieces(compressor.error):
            rows = compressor.error.new_empty(0, columns)
            if shares is not None:
                rows = shares[:, start : start + len(some)].reshape(-1, columns).contiguous()
            sizes = [len(some) if is_root else 0] * self._group.size
            some.copy_(
                self._exchange.alltoall_rows(rows, sizes, "restore", f"restore.{ERROR}{name}.{start}").wait()
            )

    def _pieces(self, error: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Blocks of rows of this rank's error with their first row, so that all ranks' fit one transfer."""
        rows = max(1, MAX_ELEMENTS // (self._group.size * error.shape[1]))
        return ((start, error[start : start + rows]) for start in range(0, len(error), rows))

    def _on_root(self, own: Tensor, name: str) -> Tensor:
        """All ranks' rows, stacked in rank order, on rank 0; none on the others."""
        sizes = [len(own), *[0] * (self._group.size - 1)]
        return self._exchange.alltoall_rows(own, sizes, "checkpoint", f"checkpoint.{name}").wait()

    def _from_root(self, whole: Tensor, name: str) -> Tensor:
        """Rank 0's tensor on every rank; the other ranks' `whole` gives shape and dtype."""
        return self._exchange.broadcast_rows(whole, 0, f"restore.{name}").wait()

    def _shares(self, name: str, saved: Mapping[str, Tensor]) -> Tensor:
        """The error of each of the current ranks: (K, m, n).

        These are the saved ones if as many ranks saved them, else equal shares of their sum. Owners' errors
        are added to it unless this compressor has owners itself.
        """
        compressor, ranks = self._compressors[name], self._group.size
        shape = compressor.error.shape
        if ERROR + name not in saved:
            return compressor.error.new_zeros(ranks, *shape)
        errors = saved[ERROR + name].to(compressor.error).view(-1, *shape)
        owners = None if isinstance(compressor, OneBit) else saved.get(OWNER_ERROR + name)
        if len(errors) == ranks and owners is None:
            return errors
        total = errors.sum(dim=0) if owners is None else errors.sum(dim=0) + owners.to(errors)
        return (total / ranks).expand(ranks, *shape)

    def _own_rows(self, compressor: OneBit, whole: Tensor) -> Tensor:
        return whole.split(compressor.sizes)[self._group.index]
