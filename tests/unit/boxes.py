"""Boxes with GPUs, on paper: the driver's list of them, and what sysfs has of their places."""

from dataclasses import replace
from pathlib import Path

from horovod_owt.parallel.gpus import Gpu
from horovod_owt.topology import Launcher, Topology

K80_PCI = ("0000:05:00.0", "0000:06:00.0", "0000:84:00.0", "0000:85:00.0")
SOCKETS = ("0-9,20-29", "10-19,30-39")  # CPUs 20-39 are the second hyperthreads of 0-19


def gpu(index: int, pci: str, **more) -> Gpu:
    """GPU-0000..., GPU-1111...: the first digit tells which."""
    uuid = f"GPU-{index}{index}{index}{index}aaaa-0000-0000-0000-00000000000{index}"
    return Gpu(index, uuid, "Tesla K80", pci, (3, 7), 12 << 30, "470.256.02", "11.4", **more)


def k80_box() -> list[Gpu]:
    """Two boards, each of two GK210, a board on each socket."""
    return [gpu(index, pci) for index, pci in enumerate(K80_PCI)]


def with_mig(one: Gpu, instances: int) -> Gpu:
    return replace(one, mig=tuple(f"MIG-{one.index}{k}bb-0000" for k in range(instances)))


def k80_sysfs(root: Path) -> Path:
    """sysfs of the K80 box, with hyperthreads, NVIDIA's sound chip beside a GPU, and a board's VGA."""
    for number, pci in enumerate(K80_PCI):
        write_device(root, pci, "0x10de", "0x030200", SOCKETS[number // 2], number // 2)
    write_device(root, "0000:05:00.1", "0x10de", "0x040300", SOCKETS[0], 0)
    write_device(root, "0000:03:00.0", "0x1a03", "0x030000", SOCKETS[0], 0)
    for cpu in range(40):
        topology = root / f"devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{cpu % 20},{cpu % 20 + 20}\n")
    return root


def write_device(root: Path, pci: str, vendor: str, kind: str, near: str, node: int) -> None:
    folder = root / "bus/pci/devices" / pci
    folder.mkdir(parents=True)
    for name, text in (("vendor", vendor), ("class", kind), ("local_cpulist", near), ("numa_node", node)):
        (folder / name).write_text(f"{text}\n")


def rank_of(
    launcher: Launcher = Launcher.GLOO,
    *,
    local_rank: int = 0,
    local_size: int = 1,
    unbound: bool | None = None,
) -> Topology:
    unbound = launcher is Launcher.GLOO if unbound is None else unbound
    return Topology(launcher, local_rank, local_size, local_rank, local_size, host="gpu07", unbound=unbound)
