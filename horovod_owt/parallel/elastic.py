"""Horovod's elastic jobs: ranks join and leave; each surviving rank keeps the last commit in memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from horovod.common.elastic import State
from horovod.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt
from torch import Tensor

RESETS = (HorovodInternalError, HostsUpdatedInterrupt)  # after these the ranks regroup


def is_elastic() -> bool:
    """Whether the launcher started an elastic job."""
    return os.environ.get("HOROVOD_ELASTIC") == "1"


@dataclass(frozen=True)
class Commit:
    """The plain values of a commit; its tensors are in `Committed.tensors`."""

    step: int
    consumed: int  # samples of the endless stream, over all ranks
    scaler: dict[str, float]  # loss scale of fp16
    run_dir: Path
    first_global_batch: int  # of the job's first world
    began_from: str = ""  # the --resume PATH of the run


class Committed(State):
    """The last commit of all ranks: plain values, and tensors by name in memory that is reused.

    They stay on the device that computes: 490 MB over a GPU's bus at each commit would delay a step.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(hvd.broadcast_object, hvd.rank)
        self._device = device
        self.last: Commit | None = None
        self.tensors: dict[str, Tensor] = {}
        self.regrouped: dict[
            str, Any
        ] = {}  # fault record of the last regrouping, for the next world to write

    def commit_copy(self, tensors: dict[str, Tensor], commit: Commit) -> None:
        """Keep a copy; if hosts joined or left since the last one, all ranks raise HostsUpdatedInterrupt."""
        for name, tensor in tensors.items():
            if name not in self.tensors:
                self.tensors[name] = torch.empty_like(tensor)
            self.tensors[name].copy_(tensor)
        self.last = commit
        self.check_host_updates()

    def sync(self) -> None:
        """Broadcast the latest commit from a rank that has it; new ranks have none.

        Through the host's memory: in a new world NCCL is not tried yet.
        """
        steps = hvd.allgather_object(self.last.step if self.last else -1, name="elastic.steps")
        root = steps.index(max(steps))
        if steps[root] < 0:
            return
        shapes = {name: (tuple(t.shape), t.dtype, t.stride()) for name, t in self.tensors.items()}
        self.last, shapes, self.regrouped = hvd.broadcast_object(
            (self.last, shapes, self.regrouped), root_rank=root, name="elastic.values"
        )
        for name, (shape, dtype, stride) in shapes.items():
            if name not in self.tensors:
                self.tensors[name] = torch.empty_strided(shape, stride, dtype=dtype, device=self._device)
            own = self.tensors[name].cpu().contiguous()
            self.tensors[name].copy_(hvd.broadcast(own, root, f"elastic.{name}"))

    def save(self) -> None:
        """Horovod's own commit is not used."""

    def restore(self) -> None:
        """Nothing to undo: after a reset the run is built again from the last commit."""


def regroup_reason(reset: HorovodInternalError | HostsUpdatedInterrupt) -> str:
    """The reason in one line: Horovod's own messages take several, and its interrupts have none."""
    if isinstance(reset, HostsUpdatedInterrupt):
        return "hosts joined or left"
    return f"a rank was lost: {str(reset).partition('. ')[0] or 'Horovod gave no reason'}"


def run(state: Committed, train: Callable[[Committed], None]) -> None:
    """Call `train` in each world that the ranks form, until it returns. Horovod must be initialised."""
    hvd.elastic.run(train)(state)
