"""One rank, one device: choose a rank's GPU or MIG instance. Needs no torch."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from horovod_owt.errors import DeviceError
from horovod_owt.parallel.gpus import Gpu, list_gpus
from horovod_owt.topology import Topology

VISIBLE = "CUDA_VISIBLE_DEVICES"
SHARED = "HOROVOD_OWT_SHARED_DEVICES"  # 1: ranks may share a device
NO_START = (  # the fix if CUDA does not start
    "run `nvidia-smi` there; a machine with NVSwitch needs `nvidia-fabricmanager`, of the driver's version"
)


@dataclass(frozen=True)
class Device:
    """What one rank computes on: CPU cores, a GPU, or one MIG instance of a GPU."""

    name: str  # torch's: cpu, cuda:0, ...
    gpu: Gpu | None = None
    mig: str = ""  # the instance's UUID
    pci_by_local_rank: tuple[str, ...] = ()  # of all ranks on this host, if this rank can see their GPUs

    @property
    def uuid(self) -> str:
        """UUID of the MIG instance, else of the GPU; empty for a CPU."""
        return self.mig or (self.gpu.uuid if self.gpu else "")

    def __str__(self) -> str:
        return f"{self.gpu.name} {self.uuid} ({self.gpu.pci})" if self.gpu else self.name


CPU = Device("cpu")


def claim_device(topology: Topology, env: MutableMapping[str, str] = os.environ) -> Device:
    """This rank's device. Call it before CUDA starts, which reads the variables set here only once.

    By default CUDA numbers the fastest GPU first; this selects the order by PCI address, like the driver and
    Slurm. CUDA uses only the first visible MIG instance, so each rank is shown only its own. Raises
    DeviceError if there is no device for this rank.
    """
    env.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    devices = visible_devices(env)
    device = assign_device(topology, devices, env)
    if any(one.mig for one in devices):
        env[VISIBLE] = device.uuid
        device = replace(device, name="cuda:0")
    return device


def visible_gpus() -> int:
    """Number of GPUs or MIG instances that this process sees; opens none of them."""
    return len(visible_devices(os.environ))


def visible_devices(env: Mapping[str, str]) -> list[Device]:
    """The devices this process sees, in CUDA's order; a GPU in MIG mode is listed as its instances.

    Raises DeviceError when CUDA_VISIBLE_DEVICES names no existing device: CUDA would show none, and the rank
    would silently train on the CPU.
    """
    words = env[VISIBLE].replace(" ", "").split(",") if VISIBLE in env else None
    if words is not None and not _kind(words[0]):
        return []  # no GPU requested (empty, -1, Slurm's NoDevFiles): do not query the driver
    gpus = list_gpus()
    places = [place for gpu in gpus for place in _places(gpu)] if words is None else _named(words, gpus)
    if gpus and not places:
        here = ", ".join(f"{number} ({gpu.uuid})" for number, gpu in enumerate(gpus))
        raise DeviceError(
            f"{VISIBLE}={env[VISIBLE]} on host {socket.gethostname()}",
            wanted=f"existing GPUs, each once: {here}",
            fix=f"unset it, or set {VISIBLE}= (empty) to train on CPU cores",
        )
    return [Device(f"cuda:{number}", gpu, mig) for number, (gpu, mig) in enumerate(places)]


def _kind(word: str) -> str:
    """`GPU-`, `MIG-` or `number`; empty if CUDA would take it for no device."""
    found = re.match(r"(GPU-|MIG-)|\d", word)
    return found[1] or "number" if found else ""


def _places(gpu: Gpu) -> list[tuple[Gpu, str]]:
    return [(gpu, mig) for mig in gpu.mig] or [(gpu, "")]


def _named(words: Sequence[str], gpus: Sequence[Gpu]) -> list[tuple[Gpu, str]]:
    """The GPUs, or MIG instances with their GPUs, that CUDA resolves `words` to.

    CUDA's rules: all words are of the first one's kind; a unique prefix of a UUID is accepted; the first
    word that names no device ends the list; a repeated word or GPU empties it.
    """
    kind = _kind(words[0])
    names = list(takewhile(lambda word: _kind(word) == kind, words))
    if kind == "number":
        names = [re.match(r"\d+", name)[0] for name in names]
    found = [_find(name, gpus) for name in names]
    found = found[: found.index([])] if [] in found else found
    if len(set(names)) < len(names) or any(places in found[:number] for number, places in enumerate(found)):
        return []
    return [place for places in found for place in places]


def _find(name: str, gpus: Sequence[Gpu]) -> list[tuple[Gpu, str]]:
    """The GPU with all its instances, or the one instance, that `name` resolves to; empty if ambiguous."""
    if _kind(name) == "number":
        return _places(gpus[int(name)]) if int(name) < len(gpus) else []
    if _kind(name) == "GPU-":
        hits = [_places(gpu) for gpu in gpus if gpu.uuid.startswith(name)]
        return hits[0] if len(hits) == 1 else []
    instances = [(gpu, mig) for gpu in gpus for mig in gpu.mig]
    hits = [place for place in instances if place[1] == name]
    hits = hits or [place for place in instances if place[1].startswith(name)]
    if not hits:  # MIG-GPU-UUID/GPU INSTANCE/COMPUTE INSTANCE, still accepted since driver 470
        parent = name.removeprefix("MIG-").partition("/")[0]
        hits = [(gpu, name) for gpu in gpus if gpu.uuid == parent]
    return hits if len(hits) == 1 else []


def assign_device(topology: Topology, devices: Sequence[Device], env: Mapping[str, str]) -> Device:
    """This rank's device among the `devices` that it sees.

    Raises DeviceError if the host has more ranks than visible devices. A rank that sees a single device takes
    it if CUDA_VISIBLE_DEVICES is set: it may be the rank's own (`srun --gpus-per-task=1`), which only
    `check_not_shared` can tell.
    """
    if not devices:
        return CPU
    ranks, seen = topology.local_size, len(devices)
    if ranks > seen and not shares_devices(env) and not (seen == 1 and VISIBLE in env):
        raise DeviceError(
            f"{ranks} ranks on host {topology.host}, and each sees {seen} of its GPUs",
            wanted="a GPU for each rank",
            fix=f"-np {seen} on this host, or set {VISIBLE}= (empty) to train on CPU cores",
        )
    own = devices[topology.local_rank % seen]
    if ranks > seen and not shares_devices(env):
        return own  # the other ranks' devices are not visible from here
    by_local_rank = tuple(devices[rank % seen].gpu.pci for rank in range(ranks))
    return replace(own, pci_by_local_rank=by_local_rank)


def shares_devices(env: Mapping[str, str]) -> bool:
    """Whether the user allows ranks to share devices."""
    return env.get(SHARED, "0") not in ("", "0")


def check_not_shared(
    everyone: Mapping[int, tuple[str, str, str]], env: Mapping[str, str] = os.environ
) -> None:
    """Raise DeviceError if ranks share a device and sharing is not allowed.

    `everyone` maps each rank to its host, device UUID (empty for a CPU) and description of the device.
    """
    if shares_devices(env):
        return
    ranks_by_uuid: dict[str, list[int]] = {}
    for rank, (_, uuid, _) in everyone.items():
        if uuid:
            ranks_by_uuid.setdefault(uuid, []).append(rank)
    shared = []
    for ranks in ranks_by_uuid.values():
        if len(ranks) > 1:
            hosts = dict.fromkeys(everyone[rank][0] for rank in ranks)  # a host's containers differ in name
            named = f"ranks {', '.join(map(str, ranks))} on host{'s'[: len(hosts) > 1]} {', '.join(hosts)}"
            shared.append(f"{named} share {everyone[ranks[0]][2]}")
    if shared:
        raise DeviceError(
            "; ".join(shared),
            wanted="a device for each rank",
            fix=f"as many ranks as devices; under srun, --gpus-per-task=1; {SHARED}=1 to allow sharing",
        )


def can_run(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code built for `architectures` (sm_75, compute_90, ...) runs on a GPU of that capability."""
    for word in architectures:
        kind, _, number = word.partition("_")
        digits = re.match(r"\d+", number)[0]
        built = int(digits[:-1]), int(digits[-1])
        if kind == "sm" and built[0] == capability[0] and built <= capability:
            return True
        if kind == "compute" and built <= capability:  # PTX, which the driver compiles
            return True
    return False


def driver_runs(cuda: str, newest: str) -> bool:
    """Whether a driver that supports CUDA `newest` runs programs built with `cuda`, by major version."""
    return int(newest.partition(".")[0] or 0) >= int(cuda.partition(".")[0] or 0)
