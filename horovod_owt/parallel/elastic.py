"""Horovod's elastic runs: ranks come and go, what was committed stays in the memory of those that remain."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import torch
from horovod.common.elastic import State
from horovod.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt
from torch import Tensor

RESETS = (HorovodInternalError, HostsUpdatedInterrupt)  # after these the ranks regroup


def is_elastic() -> bool:
    """Whether the launcher lets ranks come and go."""
    return os.environ.get("HOROVOD_ELASTIC") == "1"


class Committed(State):
    """The state that all ranks agreed on last: plain values, and tensors by name in kept memory."""

    def __init__(self) -> None:
        super().__init__(hvd.broadcast_object, hvd.rank)
        self.values: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self.parted: dict[str, Any] = {}  # why and where the last world ended, for the next to record

    @property
    def step(self) -> int:
        """Of the commit; -1 before the first."""
        return self.values.get("step", -1)

    def commit_copy(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Keep a copy, then see whether hosts came or went: if so, all ranks raise HostsUpdatedInterrupt."""
        for name, tensor in tensors.items():
            if name not in self.tensors:
                self.tensors[name] = torch.empty_like(tensor, device="cpu")
            self.tensors[name].copy_(tensor)
        self.values = values
        self.check_host_updates()

    def sync(self) -> None:
        """Give all ranks what the one with the latest commit has; newcomers have none."""
        steps = hvd.allgather_object(self.step, name="elastic.steps")
        root = steps.index(max(steps))
        if steps[root] < 0:
            return
        shapes = {name: (tuple(t.shape), t.dtype, t.stride()) for name, t in self.tensors.items()}
        self.values, shapes, self.parted = hvd.broadcast_object(
            (self.values, shapes, self.parted), root_rank=root, name="elastic.values"
        )
        for name, (shape, dtype, stride) in shapes.items():
            if name not in self.tensors:
                self.tensors[name] = torch.empty_strided(shape, stride, dtype=dtype)
            self.tensors[name].copy_(hvd.broadcast(self.tensors[name].contiguous(), root, f"elastic.{name}"))

    def save(self) -> None:
        """Horovod's own commit is not used."""

    def restore(self) -> None:
        """Nothing to undo: after a reset the run is made anew from what was committed."""


def why_regrouped(reset: HorovodInternalError | HostsUpdatedInterrupt) -> str:
    """In a line: Horovod's own messages go on for several, and its interrupts have none."""
    if isinstance(reset, HostsUpdatedInterrupt):
        return "hosts came or went"
    return f"a rank was lost: {str(reset).partition('. ')[0] or 'Horovod gave no reason'}"


def run(state: Committed, train: Callable[[Committed], None]) -> None:
    """Call `train` in each world that the ranks form, until it returns. Horovod is to be initialised."""
    hvd.elastic.run(train)(state)
