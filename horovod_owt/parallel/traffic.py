"""What a rank sends, receives and waits for, counted at each collective from the sizes sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor

from horovod_owt.parallel.activity import now
from horovod_owt.parallel.collectives import in_flight
from horovod_owt.parallel.groups import Group


@dataclass
class Waits:
    """The seconds that compute waited, for other ranks or for images."""

    device: torch.device  # that computes
    _waited_s: float = field(default=0.0, init=False)  # of CPU cores
    # of a GPU
    _idle: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list, init=False)

    def reset(self) -> None:
        self._waited_s = 0.0
        self._idle.clear()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in which compute waits for the end of this block.

        On a GPU that is less than the host waits: the GPU has work queued before the block. So events mark
        on its stream where that work ends and where the work after the block begins.
        """
        if self.device.type != "cuda":
            start = perf_counter()
            yield
            self._waited_s += perf_counter() - start
            return
        queue_empty, goes_on = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        queue_empty.record()
        yield
        goes_on.record()
        self._idle.append((queue_empty, goes_on))

    def waited_s(self) -> float:
        """Seconds that compute waited since `reset`. On a GPU, call it when the host has waited for the GPU
        since the last block, or it waits for the end of that block now.
        """
        if self._idle and not (last := self._idle[-1][1]).query():
            last.synchronize()
        return self._waited_s + sum(start.elapsed_time(end) for start, end in self._idle) / 1e3


@dataclass
class Traffic(Waits):
    """Bytes by what they carry, and the seconds that compute waited for them.

    A collective counts what its algorithm puts on the wire: a ring's share for an allreduce, own rows times
    peers for a gather. Horovod's own coordination messages, a few bytes, are not counted.
    """

    sent: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)

    def reset(self) -> None:
        super().reset()
        self.sent.clear()
        self.received.clear()

    def count(self, what: str, *, sent: int, received: int) -> None:
        self.sent[what] += sent
        self.received[what] += received


class Transfer:
    """A collective in flight. `wait` completes it and returns the result, processed by the `then` steps."""

    def __init__(
        self, handle: int, traffic: Traffic, name: str, then: Callable[[Any], Tensor] | None = None
    ) -> None:
        self._handle, self._traffic, self._name = handle, traffic, name
        self._steps = [then] if then else []
        in_flight.add(handle)

    def then(self, step: Callable[[Any], Tensor]) -> Transfer:
        """Pass the result through `step` first."""
        self._steps.append(step)
        return self

    def wait(self) -> Tensor:
        in_flight.discard(self._handle)  # Horovod forgets a handle whose operation fails
        with self._traffic.waiting(), now.waiting_in(self._name):
            result = hvd.synchronize(self._handle)
        for step in self._steps:
            result = step(result)
        return result


class Arrived:
    """The same for a group of one: nothing is sent."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def wait(self) -> Tensor:
        return self._tensor


def start_sum(
    values: Tensor, group: Group, traffic: Traffic, *, what: str, name: str, in_place: bool = False
) -> Transfer | Arrived:
    """Start to sum `values` over the group's ranks; `what` is the counter, `name` is Horovod's.

    A ring sends and receives 2 (n-1)/n of the buffer (Patarasuk and Yuan 2009).
    """
    if group.is_alone:
        return Arrived(values)
    share = 2 * (group.size - 1) * bytes_of(values) // group.size
    traffic.count(what, sent=share, received=share)
    allreduce = hvd.allreduce_async_ if in_place else hvd.allreduce_async
    handle = allreduce(values, op=hvd.Sum, name=name, process_set=group.process_set)
    return Transfer(handle, traffic, name)


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
