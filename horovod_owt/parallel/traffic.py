"""Asynchronous collectives that count a rank's bytes and the time its compute waits."""

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
    """Seconds that compute waited, for other ranks or for images."""

    device: torch.device
    _waited_s: float = field(default=0.0, init=False)  # on a CPU
    # on a GPU: start and end of each idle time
    _idle: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list, init=False)

    def reset(self) -> None:
        self._waited_s = 0.0
        self._idle.clear()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time that compute waits for the end of this block.

        A GPU waits for less time than the host, because it still has work queued from before the block. So
        events on its stream mark where that work ends and where the work after the block begins.
        """
        if self.device.type != "cuda":
            start = perf_counter()
            yield
            self._waited_s += perf_counter() - start
            return
        queue_empty, resumed = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        queue_empty.record()
        yield
        resumed.record()
        self._idle.append((queue_empty, resumed))

    def waited_s(self) -> float:
        """Seconds that compute waited since `reset`.

        On a GPU it blocks until the last block's end, unless the host has synchronised since.
        """
        if self._idle and not (last := self._idle[-1][1]).query():
            last.synchronize()
        return self._waited_s + sum(start.elapsed_time(end) for start, end in self._idle) / 1e3


@dataclass
class Traffic(Waits):
    """Bytes sent and received, by purpose, and the seconds that compute waited for them.

    A collective counts what its algorithm puts on the wire: 2 (n-1)/n of the buffer for a ring allreduce, own
    rows times peers for an allgather. Horovod's coordination messages, a few bytes, are not counted.
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
    """A collective in flight. `wait` completes it and returns the result, after the `then` functions."""

    def __init__(
        self, handle: int, traffic: Traffic, name: str, then: Callable[[Any], Tensor] | None = None
    ) -> None:
        self._handle, self._traffic, self._name = handle, traffic, name
        self._steps = [then] if then else []
        in_flight.add(handle)

    def then(self, step: Callable[[Any], Tensor]) -> Transfer:
        """Have `wait` pass the result through `step`."""
        self._steps.append(step)
        return self

    def wait(self) -> Tensor:
        in_flight.discard(self._handle)  # Horovod forgets a handle whose operation fails
        with self._traffic.waiting(), now.waiting_in(self._name):
            result = hvd.synchronize(self._handle)
        for step in self._steps:
            result = step(result)
        return result


class Completed:
    """A transfer within a group of one: nothing is sent."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def wait(self) -> Tensor:
        return self._tensor


def start_sum(
    values: Tensor, group: Group, traffic: Traffic, *, what: str, name: str, in_place: bool = False
) -> Transfer | Completed:
    """Start an allreduce (sum) of `values` over the group; `what` is the byte counter, `name` is Horovod's.

    A ring sends and receives 2 (n-1)/n of the buffer (Patarasuk and Yuan 2009).
    """
    if group.is_alone:
        return Completed(values)
    share = 2 * (group.size - 1) * bytes_of(values) // group.size
    traffic.count(what, sent=share, received=share)
    allreduce = hvd.allreduce_async_ if in_place else hvd.allreduce_async
    handle = allreduce(values, op=hvd.Sum, name=name, process_set=group.process_set)
    return Transfer(handle, traffic, name)


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
