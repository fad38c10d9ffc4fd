"""CPU affinity of a rank: the cores local to its GPU, from sysfs; else its share of all cores."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from horovod_owt.cgroups import within_quota
from horovod_owt.errors import ConfigError
from horovod_owt.parallel.device import Device
from horovod_owt.topology import Topology

SYSFS = Path("/sys")


def use_own_cores(topology: Topology, device: Device) -> int:
    """Pin this process to its cores; returns the number of compute threads, fewer under a quota of CPU time.

    Call it before large allocations: Linux places a page on the NUMA node of the core that first writes to
    it. OMP_NUM_THREADS, if set, still decides the number of threads; ConfigError if it is not a number.
    """
    on_host = os.cpu_count() or 1
    cores = own_cores(topology, device, os.sched_getaffinity(0), on_host, SYSFS)
    os.sched_setaffinity(0, cores)
    share = max(1, min(len(cores), on_host // topology.local_size))  # a rank bound to a socket shares it
    share = within_quota(share, topology.local_size)
    return _asked_threads(os.environ.get("OMP_NUM_THREADS", "")) or share


def _asked_threads(setting: str) -> int | None:
    """The first number of OMP_NUM_THREADS, which may be a list, one for each level of nested parallelism.

    None if it is not set; ConfigError for what OpenMP would not accept either.
    """
    if not setting.strip():
        return None
    first = setting.partition(",")[0].strip()
    if not (first.isdecimal() and int(first) > 0):
        raise ConfigError(
            f"OMP_NUM_THREADS={setting}",
            wanted="a positive number",
            fix="unset it: each rank takes its share of the cores",
        ).on_every_rank()
    return int(first)


def own_cores(
    topology: Topology, device: Device, allowed: Iterable[int], on_host: int, sysfs: Path
) -> list[int]:
    """The cores for this rank, out of the `allowed` ones; `on_host` is the host's number of cores.

    With a GPU: the cores local to it, divided among the ranks whose GPUs are local to the same cores. On a
    CPU, or if sysfs reports no locality: one `local_size`-th of all cores. If mpirun or srun has already
    bound the rank (it has fewer cores than the host), it keeps all of its cores that are local to its GPU.
    horovodrun and our own launchers do not bind, so without this all ranks' threads would share all cores.
    """
    cores, turn, ranks = set(allowed), topology.local_rank, topology.local_size
    bound = not topology.unbound and len(cores) < on_host
    if device.gpu and (near := cores & set(_near(device.gpu.pci, sysfs))):
        cores = near
        turn, ranks = _turn(topology, device, sysfs)
    return sorted(cores) if bound else share_of_cores(_whole_cores(cores, sysfs), turn, ranks)


def share_of_cores(cores: Sequence[int], turn: int, ranks: int) -> list[int]:
    """The `turn`-th of `ranks` parts of `cores`; all cores if there are fewer cores than ranks."""
    if len(cores) < ranks:
        return sorted(cores)
    start, end = (len(cores) * r // ranks for r in (turn, turn + 1))
    return sorted(cores[start:end])


def _turn(topology: Topology, device: Device, sysfs: Path) -> tuple[int, int]:
    """This rank's index among the ranks local to the same cores, and the number of these ranks.

    If the launcher shows each rank only its own GPU, the host's GPUs are counted instead.
    """
    near = _near(device.gpu.pci, sysfs)
    if device.pci_by_local_rank:
        ranks = [rank for rank, pci in enumerate(device.pci_by_local_rank) if _near(pci, sysfs) == near]
        return ranks.index(topology.local_rank), len(ranks)
    gpus = sorted(pci for pci in {*_nvidia_gpus(sysfs), device.gpu.pci} if _near(pci, sysfs) == near)
    return gpus.index(device.gpu.pci), len(gpus)


def _near(pci: str, sysfs: Path) -> list[int]:
    """CPUs of the socket, or part of a socket, that the device is attached to."""
    return read_cpu_list(sysfs / "bus/pci/devices" / pci / "local_cpulist")


def _nvidia_gpus(sysfs: Path) -> list[str]:
    """PCI addresses of display (0300) and 3D (0302) controllers, but not of their audio functions."""
    found = []
    for folder in (sysfs / "bus/pci/devices").glob("*"):
        vendor, kind = (_read(folder / name) for name in ("vendor", "class"))
        if vendor == "0x10de" and kind[:6] in ("0x0300", "0x0302"):
            found.append(folder.name)
    return found


def numa_node(pci: str, sysfs: Path) -> int | None:
    """The device's NUMA node; None where the firmware does not report one."""
    node = _read(sysfs / "bus/pci/devices" / pci / "numa_node")
    return int(node) if node and int(node) >= 0 else None


def _whole_cores(cpus: Iterable[int], sysfs: Path) -> list[int]:
    """CPUs sorted so that a core's hyperthreads are adjacent; Linux numbers them half the host apart."""

    def core(cpu: int) -> tuple[int, int]:
        siblings = read_cpu_list(sysfs / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        return min(siblings, default=cpu), cpu

    return sorted(cpus, key=core)


def read_cpu_list(file: Path) -> list[int]:
    """A Linux CPU list (`0-9,20-29`) as numbers; empty if there is no such file."""
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
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
