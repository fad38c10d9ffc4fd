"""Elastic jobs: ranks join and leave, and each surviving rank keeps the last commit in memory."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import horovod.torch as hvd
import torch
from horovod.common.elastic import State
from horovod.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt
from horovod.runner.http import http_client
from torch import Tensor

from horovod_owt.parallel.collectives import broadcast_object, first_cause, gather_objects
from horovod_owt.parallel.control_channel import NO_PROXY
from horovod_owt.parallel.interfaces import ipv4_address_of
from horovod_owt.parallel.rendezvous import abort_connections
from horovod_owt.parallel.store import listen_on

RESETS = (HorovodInternalError, HostsUpdatedInterrupt)  # exceptions after which the ranks regroup


def is_elastic() -> bool:
    """Whether the launcher started an elastic job."""
    return os.environ.get("HOROVOD_ELASTIC") == "1"


@dataclass(frozen=True)
class Commit:
    """The plain values of a commit; its tensors are in `ElasticState.tensors`."""

    step: int
    consumed: int  # samples of the endless stream, over all ranks
    scaler: dict[str, float]  # fp16 loss scaling
    run_dir: Path
    first_global_batch: int  # of the job's first world
    began_from: str = ""  # the --resume PATH of the run
    attempt: int = 1  # of the run folder
    checkpoint_due: bool = False  # for this step, to be written by this world or the next
    validation_due: bool = False


class ElasticState(State):
    """The last commit: plain values, and tensors by name in reused memory.

    Tensors stay on the compute device: copying 490 MB to the host at each commit would delay a step.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(lambda value: broadcast_object(value, "elastic.hosts"), hvd.rank)
        self._device = device
        self.last: Commit | None = None
        self.tensors: dict[str, Tensor] = {}
        self.regrouped: dict[
            str, Any
        ] = {}  # fault record of the last regrouping, for the next world to write

    def commit_copy(self, tensors: dict[str, Tensor], commit: Commit) -> bool:
        """Copy the tensors; returns, on every rank, whether hosts joined or left since the last commit.

        Rank 0 broadcasts that before any rank copies: if rank 0 has died, it has not recorded the step, and
        no rank may keep it.
        """
        hosts_changed = self._hosts_changed()
        self._drop_others(tensors)
        for name, tensor in tensors.items():
            if name not in self.tensors:
                self.tensors[name] = torch.empty_like(tensor)
            self.tensors[name].copy_(tensor)
        self.last = commit
        return hosts_changed

    def _hosts_changed(self) -> bool:
        try:
            self.check_host_updates()
        except HostsUpdatedInterrupt:
            return True
        return False

    def sync(self) -> None:
        """Broadcast the latest commit from a rank that has it; new ranks have none.

        Tensors go through host memory: in a new world, NCCL has not been used yet.
        """
        steps = gather_objects(self.last.step if self.last else -1, "elastic.steps")
        root = steps.index(max(steps))
        if steps[root] < 0:
            return
        layouts = {name: _layout(tensor) for name, tensor in self.tensors.items()}
        self.last, layouts, self.regrouped = broadcast_object(
            (self.last, layouts, self.regrouped), "elastic.values", kind=Commit, root_rank=root
        )
        self._drop_others(layouts)
        for name, layout in layouts.items():
            if name not in self.tensors:
                self.tensors[name] = _empty(*layout, self._device)
            own = self.tensors[name].cpu().contiguous()
            self.tensors[name].copy_(hvd.broadcast(own, root, f"elastic.{name}"))

    def _drop_others(self, names: Iterable[str]) -> None:
        """Drop other tensors: the state of compressed gradients differs between one rank and several."""
        for name in self.tensors.keys() - set(names):
            del self.tensors[name]

    def save(self) -> None:
        """Do nothing: Horovod's own commit is not used."""

    def restore(self) -> None:
        """After a failed collective, make it fail on the other ranks too.

        Gloo fails only on ranks that exchange data with the dead one, and while ranks regroup there is no
        heartbeat to tell the others. The run itself is rebuilt from the last commit.
        """
        abort_connections(keep=set())
        self._host_messages = queue.Queue()  # outdated: the driver has yet to choose the next world's hosts

    def on_reset(self) -> None:
        """Keep the driver's messages about hosts, which Horovod's own method drops.

        The driver chooses a world's hosts before it starts their ranks, and announces other hosts only once.
        A host that came back while new ranks loaded torch would be left out until some other host changes.
        """


def _layout(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """Shape, strides and dtype, as values that can be sent to other ranks."""
    return tuple(tensor.shape), tensor.stride(), str(tensor.dtype).removeprefix("torch.")


def _empty(shape: tuple[int, ...], stride: tuple[int, ...], dtype: str, device: torch.device) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=getattr(torch, dtype), device=device)


def regroup_reason(reset: HorovodInternalError | HostsUpdatedInterrupt) -> str:
    """Why the ranks regroup, in one line: Horovod's messages take several, and its interrupts have none."""
    if isinstance(reset, HostsUpdatedInterrupt):
        return "hosts joined or left"
    return f"a rank was lost: {str(first_cause(reset)).partition('. ')[0] or 'Horovod gave no reason'}"


def regroup() -> NoReturn:
    """Leave this world to form a new one with the current hosts; every rank must call it.

    Always synchronises, unlike Horovod when hosts were only removed: a host that joins before the ranks have
    regrouped starts with a `sync`, in which it would wait for ranks that skip theirs. That happens, for
    example, when a job falls below its minimum and waits for hosts.
    """
    raise HostsUpdatedInterrupt(skip_sync=False)


def regroup_without_newcomers(state: ElasticState, why: str, world_size: int) -> NoReturn:
    """Leave a world that incompatible ranks have joined; every rank that was there before must call it.

    The newcomers exit, which the driver takes for failures.
    """
    step = state.last.step if state.last else 0
    state.regrouped = {"fault": f"ranks regroup: {why}", "step": step, "world_size": world_size}
    raise HorovodInternalError(why)


def run(state: ElasticState, train: Callable[[ElasticState], None]) -> None:
    """Call `train` in each world that the ranks form, until it returns. Horovod must be initialised."""
    if interface := os.environ.get("HOROVOD_GLOO_IFACE"):
        listen_on(ipv4_address_of(interface))  # the service through which the driver announces new hosts
    http_client.urlopen = NO_PROXY.open  # sends the driver that service's address and key
    hvd.elastic.run(train)(state)
