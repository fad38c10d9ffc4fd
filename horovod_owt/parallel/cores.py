"""Which cores a rank keeps to: those near its GPU, by what sysfs says of PCI lanes; else its share of all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from horovod_owt.errors import ConfigError
from horovod_owt.parallel.device import Device
from horovod_owt.topology import Topology

SYSFS = Path("/sys")


def use_own_cores(topology: Topology, device: Device) -> int:
    """Keep this process to its cores; returns how many threads are to compute there.

    Memory needs no more: Linux puts a page on the node of the core that first writes to it, and all that
    counts is allocated after this. OMP_NUM_THREADS, if set, still decides the number of threads;
    raises ConfigError where it is no number.
    """
    on_host = os.cpu_count() or 1
    cores = own_cores(topology, device, os.sched_getaffinity(0), on_host, SYSFS)
    os.sched_setaffinity(0, cores)
    share = max(1, min(len(cores), on_host // topology.local_size))  # bound to a socket is not alone on it
    return _asked_threads(os.environ.get("OMP_NUM_THREADS", "")) or share


def _asked_threads(setting: str) -> int | None:
    """The first number of OMP_NUM_THREADS, which may be a list, one for each level of nested parallelism.

    None where it is not set; ConfigError for what OpenMP would not take either.
    """
    if not setting.strip():
        return None
    first = setting.partition(",")[0].strip()
    if not (first.isdecimal() and int(first) > 0):
        raise ConfigError(
            f"OMP_NUM_THREADS={setting}",
            wanted="a number from 1 on",
            fix="unset it: a rank has a share of the cores",
        ).on_every_rank()
    return int(first)


def own_cores(
    topology: Topology, device: Device, allowed: Iterable[int], on_host: int, sysfs: Path
) -> list[int]:
    """Those of the `allowed` cores that this rank is to use, of `on_host` that the host has.

    Of the cores near its GPU, a share for each rank whose GPU they are near to; with a CPU, or where sysfs
    does not say what is near, its `local_size`-th of all. mpirun and srun may have bound the rank already:
    then its cores are fewer than the host's, and all of them that are near its GPU stay. horovodrun binds
    nothing, nor do the start scripts and jobs, and two ranks' threads would chase each other over all cores.
    """
    cores, turn, ranks = set(allowed), topology.local_rank, topology.local_size
    bound = not topology.unbound and len(cores) < on_host
    if device.gpu and (near := cores & set(_near(device.gpu.pci, sysfs))):
        cores = near
        turn, ranks = _turn(topology, device, sysfs)
    return sorted(cores) if bound else share_of_cores(_whole_cores(cores, sysfs), turn, ranks)


def share_of_cores(cores: Sequence[int], turn: int, ranks: int) -> list[int]:
    """The `turn`-th of `ranks` pieces of `cores`; all where there are fewer cores than ranks."""
    if len(cores) < ranks:
        return sorted(cores)
    start, end = (len(cores) * r // ranks for r in (turn, turn + 1))
    return sorted(cores[start:end])


def _turn(topology: Topology, device: Device, sysfs: Path) -> tuple[int, int]:
    """Which of how many ranks near the same cores this one is.

    Where the launcher shows each rank its own GPU alone, the host's other GPUs stand for the other ranks.
    """
    near = _near(device.gpu.pci, sysfs)
    if device.pci_by_local_rank:
        ranks = [rank for rank, pci in enumerate(device.pci_by_local_rank) if _near(pci, sysfs) == near]
        return ranks.index(topology.local_rank), len(ranks)
    gpus = sorted(pci for pci in {*_nvidia_gpus(sysfs), device.gpu.pci} if _near(pci, sysfs) == near)
    return gpus.index(device.gpu.pci), len(gpus)


def _near(pci: str, sysfs: Path) -> list[int]:
    """CPUs of the socket, or the part of one, that the device's PCI lanes lead to."""
    return read_cpu_list(sysfs / "bus/pci/devices" / pci / "local_cpulist")


def _nvidia_gpus(sysfs: Path) -> list[str]:
    """PCI addresses: of display (0300) and 3D (0302) controllers, not of the sound chips beside them."""
    found = []
    for folder in (sysfs / "bus/pci/devices").glob("*"):
        vendor, kind = (_read(folder / name) for name in ("vendor", "class"))
        if vendor == "0x10de" and kind[:6] in ("0x0300", "0x0302"):
            found.append(folder.name)
    return found


def numa_node(pci: str, sysfs: Path) -> int | None:
    """Of the device; None where the firmware does not say."""
    node = _read(sysfs / "bus/pci/devices" / pci / "numa_node")
    return int(node) if node and int(node) >= 0 else None


def _whole_cores(cpus: Iterable[int], sysfs: Path) -> list[int]:
    """Hyperthreads of one core beside each other: in Linux's numbering they are half the host apart."""

    def core(cpu: int) -> tuple[int, int]:
        siblings = read_cpu_list(sysfs / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        return min(siblings, default=cpu), cpu

    return sorted(cpus, key=core)


def read_cpu_list(file: Path) -> list[int]:
    """Linux's `0-9,20-29` as numbers; none where there is no such file."""
    cpus = []
    for part in filter(None, _read(file).split(",")):
        first, _, last = part.partition("-")
        cpus += range(int(first), int(last or first) + 1)
    return cpus


def cpu_list(cpus: Iterable[int]) -> str:
    """Numbers as Linux writes them: `0-9,20-29`."""
    parts: list[list[int]] = []
    for cpu in sorted(cpus):
        if parts and cpu == parts[-1][-1] + 1:
            parts[-1][1:] = [cpu]
        else:
            parts.append([cpu])
    return ",".join("-".join(map(str, part)) for part in parts)


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
