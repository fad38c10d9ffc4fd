"""Horovod's collectives over fake tensors: shapes, and what its NCCL build accepts."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor

from horovod_owt.perf.network import HIDDEN, share

# What Horovod 0.28.1 has CUDA entries for (torch/mpi_ops_v2.cc) and NCCL operations carry (GetNCCLDataType).
SUMMED = {torch.int32, torch.int64, torch.float16, torch.float32, torch.float64}
MOVED = SUMMED | {torch.uint8, torch.int8, torch.int16}
CLASSES = 1000
# To wait is to let the GPU come so far: what it could do meanwhile is to be on its way.
STARTED_BEFORE = {"labels": "features"}

Stretch = tuple[int, int, int]  # a storage, and from which byte to which


class Refused(AssertionError):
    """What a run on GPUs would not survive, or would compute wrongly."""


@dataclass
class Flight:
    """A collective that nobody has waited for yet."""

    name: str
    writes: list[Stretch]  # nobody else may touch this memory
    reads: list[Stretch]  # nobody else may write to this
    result: Any
    keep: list[Tensor]


class Collectives:
    """They take Horovod's place in `hvd`, as if every rank had sent what this one, rank 0, sends."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.flights: dict[int, Flight] = {}
        self.done: Counter[str] = Counter()
        self._lock = threading.Lock()  # autograd's thread starts some
        self._handle = 0

    def install(self) -> None:
        for name in ("allreduce", "broadcast", "synchronize"):
            setattr(hvd, name, getattr(self, name))
        for name in ("allreduce_async", "allreduce_async_", "allgather_async", "broadcast_async"):
            setattr(hvd, name, getattr(self, name))
        hvd.alltoall_async = self.alltoall_async
        self._install_objects()
        hvd.rank, hvd.size, hvd.barrier = lambda: 0, lambda: self.ranks, lambda: None
        hvd.global_process_set.ranks = list(range(self.ranks))

    def _install_objects(self) -> None:
        """Values travel as JSON in tensors, and fake ones have no content: they do not travel here."""
        replaced = {
            "broadcast_object": lambda value, name, **_: value,
            "gather_objects": lambda value, name, **_: [value] * self.ranks,
        }
        for module in [module for name, module in sys.modules.items() if name.startswith("horovod_owt")]:
            for name in replaced.keys() & vars(module).keys():
                setattr(module, name, replaced[name])

    def allreduce_async(self, tensor, name=None, op=None, process_set=None):
        self._check(tensor, name, SUMMED)
        return self._start("allreduce", name, tensor, torch.empty_like(tensor))

    def allreduce_async_(self, tensor, name=None, op=None, process_set=None):
        self._check(tensor, name, SUMMED)
        return self._start("allreduce", name, tensor, tensor, writes=[tensor])

    def allgather_async(self, tensor, name=None, process_set=None):
        self._check(tensor, name, MOVED)
        ranks = len(process_set.ranks)
        return self._start("allgather", name, tensor, _empty_rows(tensor, _gathered(len(tensor), ranks)))

    def broadcast_async(self, tensor, root_rank, name=None, process_set=None):
        self._check(tensor, name, MOVED)
        return self._start("broadcast", name, tensor, torch.empty_like(tensor))

    def alltoall_async(self, tensor, splits=None, name=None, process_set=None):
        self._check(tensor, name, MOVED)
        if splits.device.type != "cpu":
            raise Refused(f"splits of {name} on the GPU: Horovod copies them to the host")
        rows = splits.tolist()[0] * len(process_set.ranks)
        return self._start("alltoall", name, tensor, (_empty_rows(tensor, rows), splits))

    def synchronize(self, handle):
        with self._lock:
            flight = self.flights.pop(handle)
        started = {each.name.partition(".")[0] for each in self.flights.values()}
        if (earlier := STARTED_BEFORE.get(flight.name)) and earlier not in started:
            raise Refused(f"{flight.name} are waited for before {earlier} are sent")
        return flight.result

    def allreduce(self, tensor, name=None, op=None, process_set=None):
        return self.synchronize(self.allreduce_async(tensor, name=name))

    def broadcast(self, tensor, root_rank, name=None, process_set=None):
        return self.synchronize(self.broadcast_async(tensor, root_rank, name=name))

    def check_access(self, tensor: Tensor, *, writes: bool, what: str) -> None:
        """Raise Refused if an operation touches memory that a collective in flight still uses."""
        where = stretch(tensor)
        for flight in list(self.flights.values()):
            if any(_overlap(where, owned) for owned in flight.writes):
                raise Refused(f"{what} touches what {flight.name} is summing")
            if writes and any(_overlap(where, sent) for sent in flight.reads):
                raise Refused(f"{what} writes what {flight.name} is sending")

    def _check(self, tensor: Tensor, name: str, dtypes: set[torch.dtype]) -> None:
        if tensor.dtype not in dtypes:
            raise Refused(f"{name} has {tensor.dtype}")
        if not tensor.is_contiguous():
            raise Refused(f"{name} is not contiguous: {tuple(tensor.stride())}")
        if any(flight.name == name for flight in self.flights.values()):
            raise Refused(f"{name} is in flight already")

    def _start(self, kind: str, name: str, tensor: Tensor, result: Any, writes: Sequence[Tensor] = ()) -> int:
        with self._lock:
            self._handle += 1
            written = [stretch(each) for each in writes]
            self.flights[self._handle] = Flight(name, written, [stretch(tensor)], result, [tensor, *writes])
            self.done[f"{kind} {tensor.device.type} {str(tensor.dtype)[6:]}"] += 1
            return self._handle


def _gathered(rows: int, ranks: int) -> int:
    """Rows of all ranks; a split layer's parts differ where its units are no multiple of the ranks."""
    uneven = [units for units in (HIDDEN, CLASSES) if units % ranks and share(units, ranks, 0) == rows]
    return uneven[0] if uneven else rows * ranks


def _empty_rows(like: Tensor, rows: int) -> Tensor:
    return like.new_empty((rows, *like.shape[1:]))


def stretch(tensor: Tensor) -> Stretch:
    """The memory of a tensor; a strided one is taken for the whole of what it spans."""
    size = tensor.element_size()
    start = tensor.storage_offset() * size
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    end = start + (last + 1) * size if tensor.numel() else start
    return tensor.untyped_storage()._cdata, start, end


def _overlap(a: Stretch, b: Stretch) -> bool:
    return a[0] == b[0] and a[1] < b[2] and b[1] < a[2]
