"""Initialise Horovod, and describe this rank's place in the job."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError

from horovod_owt.errors import ConfigError, DeviceError
from horovod_owt.parallel.collectives import gather_objects
from horovod_owt.parallel.cores import use_own_cores
from horovod_owt.parallel.device import Device, check_not_shared, shares_devices
from horovod_owt.parallel.groups import Group, fc_group_ranks, group_of, process_sets, shard_group_ranks
from horovod_owt.parallel.interfaces import interface_of_lone_rank
from horovod_owt.parallel.mpi import yield_when_idle
from horovod_owt.parallel.timeline import ENVIRONMENT as TIMELINE
from horovod_owt.parallel.torchrun import close_server, join_torchrun
from horovod_owt.topology import LAUNCHERS, Launcher, Topology, loopback_place, read_topology
from horovod_owt.versions import installed_versions

NCCL_SHARES_DEVICES = 23000  # the first NCCL with NCCL_MULTI_RANK_GPU_ENABLE


@dataclass(frozen=True)
class World:
    """This rank's place in the job: queried once, then passed on."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    device: torch.device
    threads: int  # compute threads of this rank
    process_sets: tuple[hvd.ProcessSet, ...] = ()  # for the fc_group_size passed to `init`

    @property
    def is_root(self) -> bool:
        return self.rank == 0

    @property
    def everyone(self) -> Group:
        return group_of(self.rank, fc_group_ranks(self.size, self.size), self.process_sets)

    def fc_group(self, group_size: int) -> Group:
        """The `group_size` ranks that share their FC layers with this one."""
        return group_of(self.rank, fc_group_ranks(self.size, group_size), self.process_sets)

    def shard_group(self, group_size: int) -> Group:
        """The ranks that hold the same part of FC layers shared by `group_size` ranks."""
        return group_of(self.rank, shard_group_ranks(self.size, group_size), self.process_sets)


def init(
    device: Device, *, stall_limit_s: float = 600.0, fc_group_size: int = 1, timeline: bool = False
) -> World:
    """Join the job with this device, once per process: Gloo does not survive repeated initialisation.

    Creates the process sets for groups of `fc_group_size` ranks: sets added later cost a round trip in each
    cycle. `timeline` allows `start_timeline`. Tensor fusion is off, because buckets of a flat buffer need no
    fusion buffer: 0.152 instead of 0.175 s for 244 MB on two ranks. Variables set by the user are kept.

    Raises ConfigError if the ranks disagree on `fc_group_size` or Horovod's MPI is not the launcher's.
    """
    topology = read_topology()
    if topology.launcher is Launcher.TORCHRUN:
        join_torchrun(topology)
    # before Horovod and DALI start threads, which inherit the cores
    torch.set_num_threads(use_own_cores(topology, device))
    defaults = {
        "HOROVOD_FUSION_THRESHOLD": "0",
        # Longer than the heartbeat's limit, so that the heartbeat reports and ends the job first.
        "HOROVOD_STALL_CHECK_TIME_SECONDS": str(int(stall_limit_s) + 15),
        "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": str(int(stall_limit_s) + 30),
        "HOROVOD_GLOO_TIMEOUT_SECONDS": str(int(stall_limit_s) + 60),  # its default of 30 s is too short
    }
    if timeline:
        defaults |= TIMELINE
    defaults |= _background_thread_sleep(topology.world_size, fc_group_size, on_gpu=device.gpu is not None)
    if device.gpu is None:
        yield_when_idle()
    else:
        defaults |= _nccl_on_shared_device(device, topology, nccl_version(), os.environ)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if topology.launcher is Launcher.NONE:
        _set_single_rank_environment()
    sets = process_sets(topology.world_size, fc_group_size)
    try:
        hvd.init(process_sets=sets)
    except ValueError as error:
        if not sets:
            raise
        raise ConfigError(  # Horovod compares the sets of all ranks, and has logged the difference
            f"Horovod did not start with fc_group_size={fc_group_size}: {error}",
            wanted="the same fc_group_size on every rank; `node` differs between hosts of different size",
            fix="--set fc_group_size=K with a number",
        ).on_every_rank() from None
    _check_size(topology)
    if topology.launcher is Launcher.TORCHRUN:
        hvd.barrier()
        close_server()
    if device.gpu is not None:
        torch.cuda.set_device(device.name)
    return current_world(device, tuple(sets))


def _check_size(topology: Topology) -> None:
    """Raise ConfigError if Horovod does not see the launcher's ranks: each would be a job of its own."""
    if hvd.size() == topology.world_size or os.environ.get("HOROVOD_ELASTIC") == "1":  # where it may change
        return
    if topology.launcher is Launcher.GLOO:
        raise ConfigError(
            f"HOROVOD_RANK={topology.rank} HOROVOD_SIZE={topology.world_size}, but Horovod sees {hvd.size()}",
            wanted="the variables of one job: these may be left from another",
            fix="unset HOROVOD_RANK HOROVOD_SIZE",
        )
    if topology.launcher is not Launcher.NONE:
        raise ConfigError(
            f"{topology.launcher} started {topology.world_size} ranks, Horovod's MPI sees {hvd.size()}",
            wanted="the MPI that Horovod is built with",
            fix="put its mpirun first on PATH, or use `owt launch hosts --hosts FILE -- DATA --run-dir DIR`; "
            f"unset {LAUNCHERS[topology.launcher].size}, if it is left from another job",
        ).on_every_rank()


def current_world(device: Device, sets: tuple[hvd.ProcessSet, ...] = ()) -> World:
    """This rank's current place in the job; in an elastic job it changes whenever the ranks regroup."""
    local_rank, local_size = loopback_place() or (hvd.local_rank(), hvd.local_size())
    return World(
        rank=hvd.rank(),
        size=hvd.size(),
        local_rank=local_rank,
        local_size=local_size,
        host=read_topology().host,
        device=torch.device(device.name),
        threads=torch.get_num_threads(),
        process_sets=sets,
    )


def check_devices(device: Device, world: World) -> None:
    """Raise DeviceError on every rank if ranks share a device, because a launcher shows both the same one.

    Every rank must call it, after each (re)initialisation, before the first step.
    """
    everyone = gather_objects((world.host, device.uuid, str(device)), "devices")
    try:
        check_not_shared(dict(enumerate(everyone)))
    except DeviceError as error:
        raise error.on_every_rank() from None


def _background_thread_sleep(world_size: int, fc_group_size: int, *, on_gpu: bool) -> dict[str, str]:
    """How long Horovod's background thread sleeps between two polls, in ms.

    On CPU cores, polling at the default of 1 ms takes 10 to 20 % of a core from compute. With our patch it
    sleeps until there is work, but only over Gloo, and not with process sets, whose collectives would wait
    for sleeping ranks outside the set. With a GPU, cores are free and latency matters: at 1 ms a small
    allreduce takes 1.1 ms.
    """
    nested = 1 < fc_group_size < world_size
    until_work = {}
    if os.environ.get("HOROVOD_CONTROLLER") == "gloo" and not nested:
        until_work = {"HOROVOD_IDLE_CYCLE_TIME": "100"}
    if on_gpu:
        return {"HOROVOD_CYCLE_TIME": "0.1", **until_work}
    return until_work or {"HOROVOD_CYCLE_TIME": "5"}


def _nccl_on_shared_device(
    device: Device, topology: Topology, nccl: int, env: Mapping[str, str]
) -> dict[str, str]:
    """Variables that let ranks share a GPU, or use MIG instances of one, which NCCL refuses by default.

    NCCL 2.30 has a variable for that. Older versions only compare ranks of the same host, so each rank claims
    to be on a host of its own; NCCL then uses the network between them, which is slow.
    """
    if not (shares_devices(env) or device.mig):
        return {}
    if nccl >= NCCL_SHARES_DEVICES:
        return {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    return {"NCCL_HOSTID": f"{topology.host}-{topology.rank}"}


def shutdown() -> None:
    """Leave the job, all ranks together: the first rank to leave would shut Horovod down for the others.

    A rank that dies at this point has finished its work, and is left to the launcher to report.
    """
    with suppress(HorovodInternalError):
        hvd.barrier()
    hvd.shutdown()


def uses_mpi() -> bool:
    """Whether ranks communicate over MPI, not Gloo."""
    return hvd.mpi_built() and hvd.mpi_enabled()


def versions() -> dict[str, str]:
    """The versions of this rank's software, for run folders and reports."""
    controller = {"horovod_controller": "mpi" if uses_mpi() else "gloo"}
    return {**installed_versions(), **controller, "horovod_operations": operations()}


def nccl_version() -> int:
    """The NCCL that Horovod was built with: 22703 for 2.27.3, 0 for none."""
    return int(hvd.nccl_built())


def operations() -> str:
    """The operations Horovod was built with; needs no `init`."""
    nccl = nccl_version()
    names = {
        "gloo": hvd.gloo_built(),
        "mpi": hvd.mpi_built(),
        f"nccl {nccl // 10000}.{nccl // 100 % 100}.{nccl % 100}": nccl,
    }
    return " ".join(name for name, built in names.items() if built)


def _set_single_rank_environment() -> None:
    """Make plain `owt train` a Gloo job of one rank, which needs neither a launcher nor MPI's daemons."""
    lone = {"RANK": 0, "SIZE": 1, "LOCAL_RANK": 0, "LOCAL_SIZE": 1, "CROSS_RANK": 0, "CROSS_SIZE": 1}
    for name, value in lone.items():
        os.environ[f"HOROVOD_{name}"] = str(value)
    os.environ["HOROVOD_CONTROLLER"] = os.environ["HOROVOD_CPU_OPERATIONS"] = "gloo"
    os.environ["HOROVOD_GLOO_IFACE"] = interface_of_lone_rank()  # one that is set may be another host's
