"""One rank, one device: which GPU a rank takes, and which cores where there is none."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from horovod_owt.errors import DeviceError
from horovod_owt.topology import Topology


def visible_gpus() -> int:
    """GPUs that this process sees, without taking hold of one."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def assign_device(topology: Topology, visible: int) -> str:
    """The device of this rank, when it sees `visible` GPUs.

    Raises DeviceError when the host has more ranks than it shows GPUs. A rank that sees one GPU among several
    ranks may have it to itself (`srun --gpus-per-task=1`), but only where the launcher narrowed its view by
    CUDA_VISIBLE_DEVICES.
    """
    if visible == 0:
        return "cpu"
    narrowed = visible == 1 and "CUDA_VISIBLE_DEVICES" in os.environ and topology.launcher != "horovodrun"
    if topology.local_size > visible and not narrowed:
        raise DeviceError(
            f"{topology.local_size} ranks on host {topology.host}, where each sees {visible} of its GPUs",
            wanted="a GPU for each rank",
            fix=f"-np {visible} on this host, or CUDA_VISIBLE_DEVICES= (empty) to train on its CPU cores",
        )
    return f"cuda:{0 if visible == 1 else topology.local_rank}"


def share_of_cores(cores: Sequence[int], local_rank: int, local_size: int) -> list[int]:
    """This rank's `local_size`-th of the cores, in one piece; all where there are fewer cores than ranks."""
    if len(cores) < local_size:
        return sorted(cores)
    start, end = (len(cores) * r // local_size for r in (local_rank, local_rank + 1))
    return sorted(cores)[start:end]


def use_share_of_cores(topology: Topology) -> int:
    """Keep this process to its share of the host's cores and torch to as many threads; returns how many.

    mpirun and srun may have bound the rank already: then its cores are fewer than the host's, and they stay.
    horovodrun binds nothing, and two ranks' threads would chase each other over all cores. OMP_NUM_THREADS,
    if set, still decides the number of threads.
    """
    cores, on_host = sorted(os.sched_getaffinity(0)), os.cpu_count() or 1
    if topology.launcher == "horovodrun" or len(cores) == on_host:
        cores = share_of_cores(cores, topology.local_rank, topology.local_size)
        os.sched_setaffinity(0, cores)
    share = max(1, min(len(cores), on_host // topology.local_size))  # bound to a socket is not alone on it
    threads = int(os.environ.get("OMP_NUM_THREADS") or share)
    torch.set_num_threads(threads)
    return threads
