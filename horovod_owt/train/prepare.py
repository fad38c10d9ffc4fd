"""Checks before ranks connect, while no peer waits in a collective."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from horovod_owt.config import TrainConfig, check_batch_norm, resolve
from horovod_owt.data.pipeline import resolve_kind
from horovod_owt.data.store import DataSet, open_data_set
from horovod_owt.errors import ConfigError, DeviceError, OwtError
from horovod_owt.files import real_path
from horovod_owt.parallel.device import Device, claim_device
from horovod_owt.topology import Topology, rank_topology, resolve_group_size


@dataclass(frozen=True)
class Request:
    """A validated request to train, as far as one rank can check it."""

    cfg: TrainConfig  # with the number of classes filled in
    data: Path
    folder: DataSet
    device: Device


def prepare_alone(data: Path, recipe: str | None, settings: tuple[str, ...]) -> Request:
    """Resolve the configuration, open the data set, choose the device; raises OwtError if one is invalid."""
    topology = rank_topology()
    try:
        cfg = resolve(recipe, settings)
        folder = open_data_set(data)
        if 0 < cfg.classes < len(folder.classes):
            raise ConfigError(
                f"classes={cfg.classes}, but {data} has {len(folder.classes)}",
                wanted="an output for each class",
                fix="--set classes=0 takes the number from the data set",
            )
        cfg = dataclasses.replace(
            cfg,
            classes=cfg.classes or len(folder.classes),
            pipeline=resolve_kind(cfg.pipeline),
            fc_group_size=_group_size(cfg, topology),
        )
        check_batch_norm(cfg, topology.world_size)
        device = choose_device(cfg, topology)
    except OwtError as error:
        error.on_every_rank()
        raise
    return Request(cfg, real_path(data), folder, device)


def _group_size(cfg: TrainConfig, topology: Topology) -> int:
    """Ranks that share the FC layers. With parallel=data each has its own, and hosts may differ in size."""
    return 1 if cfg.parallel == "data" else resolve_group_size(cfg.fc_group_size, topology)


def choose_device(cfg: TrainConfig, topology: Topology) -> Device:
    """This rank's device; raises OwtError if there is none for it, or it cannot run the configuration."""
    device = claim_device(topology)
    if device.gpu is not None:
        _check_torch_sees(device, topology)
    elif cfg.precision == "fp16":
        raise ConfigError("precision=fp16 on a CPU", wanted="fp32 or bf16", fix="--set precision=bf16")
    return device


def _check_torch_sees(device: Device, topology: Topology) -> None:
    """Raise DeviceError for a GPU that torch cannot use: training would silently run on the CPU."""
    import torch  # not needed before there is a GPU

    if not torch.cuda.is_available():
        gpu, built_for = device.gpu, torch.version.cuda or "no CUDA"
        raise DeviceError(
            f"torch {torch.__version__} on host {topology.host} cannot use its {gpu.name}: it is built for "
            f"CUDA {built_for}, driver {gpu.driver} supports up to CUDA {gpu.cuda_driver}",
            wanted="a torch for this driver",
            fix="run `launch/setup`, or set CUDA_VISIBLE_DEVICES= (empty) to train on CPU cores",
        )
