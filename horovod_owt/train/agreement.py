"""Check before the first step that all ranks have the same versions, code, configuration and data."""

from __future__ import annotations

import torch

from horovod_owt.config import TrainConfig
from horovod_owt.errors import ConfigError
from horovod_owt.parallel import runtime
from horovod_owt.parallel.collectives import broadcast_object, gather_objects, sum_over_ranks
from horovod_owt.parallel.device import Device
from horovod_owt.parallel.runtime import World
from horovod_owt.versions import code_digest

FIX = {  # by the first word of what differs
    "version": "install the same environment on every host",
    "code": "use the same checkout of horovod_owt on every host",
    "config": "pass the same recipe and --set to every rank",
    "data": "copy it to every host, or use a shared folder",
    "device": "run `owt devices`, or set CUDA_VISIBLE_DEVICES= (empty) to train on CPU cores everywhere",
}


def check_agreement(cfg: TrainConfig, fingerprint: str, device: Device, world: World) -> None:
    """Raise ConfigError on every rank, with a table of values and ranks, if ranks differ.

    `fingerprint` is that of the data set. Raises DeviceError if ranks share a device.
    """
    own = facts(cfg, fingerprint, device)
    # Facts are gathered (12 MB for 4096 ranks) only if some rank differs from rank 0.
    differs = own != broadcast_object(own, "facts of rank 0")
    if not sum_over_ranks(torch.tensor([float(differs)]), "ranks that differ").item():
        return runtime.check_devices(device, world)
    everyone = gather_objects((world.host, own), "agreement")
    if table := differences(everyone):
        kinds = dict.fromkeys(line.split()[0] for line in table if not line.startswith(" "))
        rows = "".join(f"\n  {line}" for line in table)
        raise ConfigError(
            f"ranks disagree on {', '.join(kinds)}:{rows}\n",
            wanted="the same on every rank",
            fix="; ".join(FIX[kind] for kind in kinds),
        ).on_every_rank()
    runtime.check_devices(device, world)


def facts(cfg: TrainConfig, fingerprint: str, device: Device) -> dict[str, str]:
    """What must be equal on every rank: values by two-word names."""
    versions = {f"version {name}": value for name, value in runtime.versions().items()}
    config = {f"config {key}": str(value) for key, value in cfg.to_dict().items()}
    return {
        **versions,
        "code sha256": code_digest(),
        **config,
        "data set": fingerprint,
        "device kind": "GPU" if device.gpu else "CPU",
    }


def differences(everyone: list[tuple[str, dict[str, str]]]) -> list[str]:
    """Table lines for the facts that differ: name, values, and the ranks with each value.

    `everyone` is (host, facts) by rank; a missing fact counts as `none`.
    """
    names = dict.fromkeys(name for _, own in everyone for name in own)
    lines = []
    for name in names:
        ranks_by_value: dict[str, list[str]] = {}
        for rank, (host, own) in enumerate(everyone):
            ranks_by_value.setdefault(own.get(name, "none"), []).append(f"{rank} ({host})")
        if len(ranks_by_value) > 1:
            for number, (value, ranks) in enumerate(ranks_by_value.items()):
                what = name if number == 0 else " " * len(name)
                some = ", ".join(ranks[:4]) + (f" and {len(ranks) - 4} more" if ranks[4:] else "")
                lines.append(f"{what}  {value}: rank{'s'[: len(ranks) > 1]} {some}")
    return lines
