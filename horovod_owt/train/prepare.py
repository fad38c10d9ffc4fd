"""Checks of each rank before the ranks connect, while no peer waits in a collective."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from horovod_owt.config import TrainConfig, check_batch_norm, resolve
from horovod_owt.data.cache import cached
from horovod_owt.data.pipeline import resolve_kind
from horovod_owt.data.store import DataSet, open_data_set
from horovod_owt.errors import ConfigError, DeviceError, OwtError
from horovod_owt.files import real_path
from horovod_owt.parallel.device import NO_START, Device, can_run, claim_device, driver_runs
from horovod_owt.parallel.gpus import Gpu
from horovod_owt.topology import Topology, rank_topology, resolve_group_size

# The first compute capability with arithmetic in that precision.
MIN_CAPABILITY = {"bf16": (8, 0), "fp16": (5, 3)}


@dataclass(frozen=True)
class Request:
    """A request to train, validated as far as one rank can by itself."""

    cfg: TrainConfig  # with the number of classes filled in
    data: Path
    folder: DataSet
    device: Device


def prepare_request(data: Path, recipe: str | None, settings: tuple[str, ...]) -> Request:
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


@contextmanager
def with_cache(request: Request) -> Iterator[Request]:
    """The request with its images read through the configured cache; raises ConfigError."""
    cfg, speaks = request.cfg, rank_topology().local_rank == 0
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(cached(request.folder, cfg.cache, cfg.cached_side(), speaks=speaks))
        except OwtError as error:
            error.on_every_rank()
            raise
        yield dataclasses.replace(request, folder=folder)


def _group_size(cfg: TrainConfig, topology: Topology) -> int:
    """How many ranks share the FC layers; 1 with parallel=data, for which hosts may differ in size."""
    return 1 if cfg.parallel == "data" else resolve_group_size(cfg.fc_group_size, topology)


def choose_device(cfg: TrainConfig, topology: Topology, *, alone: bool = False) -> Device:
    """This rank's device; raises OwtError if there is none, or if it cannot run the configuration.

    A process that runs `alone` does not need Horovod's GPU support.
    """
    device = claim_device(topology)
    if device.gpu is not None:
        if cfg.deterministic:  # cuBLAS reads it once, when CUDA starts
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        _check_precision(cfg, device.gpu)
        _check_torch_can_use(device, topology)
        if not alone:
            _check_horovod_can_use(device, topology)
    elif cfg.precision == "fp16":
        raise ConfigError("precision=fp16 on a CPU", wanted="fp32 or bf16", fix="--set precision=bf16")
    return device


def _check_precision(cfg: TrainConfig, gpu: Gpu) -> None:
    """Raise ConfigError for a precision that the GPU does not support."""
    if gpu.compute_capability >= MIN_CAPABILITY.get(cfg.precision, (0, 0)):
        return
    supported = (
        name
        for name in ("bf16", "fp16", "fp32")
        if gpu.compute_capability >= MIN_CAPABILITY.get(name, (0, 0))
    )
    major, minor = MIN_CAPABILITY[cfg.precision]
    raise ConfigError(
        f"precision={cfg.precision} on {gpu.name}, which is {_architecture(gpu)}",
        wanted=f"sm_{major}{minor} or newer for it",
        fix=f"--set precision={next(supported)}",
    )


def _check_torch_can_use(device: Device, topology: Topology) -> None:
    """Raise DeviceError for a GPU that torch cannot use: training would fail later, or run on the CPU."""
    import torch  # not needed before there is a GPU

    from horovod_owt.parallel.cuda import cuda_fault

    gpu = device.gpu
    torch_here = f"torch {torch.__version__} on host {topology.host} cannot use its {gpu.name}"
    on_cores = "or set CUDA_VISIBLE_DEVICES= (empty) to train on CPU cores"
    if fault := cuda_fault():
        built_for = torch.version.cuda
        if built_for and driver_runs(built_for, gpu.cuda_driver):
            raise DeviceError(
                f"{torch_here}: CUDA does not start with driver {gpu.driver}: {fault}",
                wanted="a driver that works",
                fix=f"{NO_START}; {on_cores}",
            )
        built = f"for CUDA {built_for}" if built_for else "without CUDA"
        raise DeviceError(
            f"{torch_here}: it is built {built}, driver {gpu.driver} supports up to CUDA {gpu.cuda_driver}",
            wanted="a torch for this driver",
            fix=f"run `launch/setup`, {on_cores}",
        )
    architectures = torch.cuda.get_arch_list()
    if not can_run(architectures, gpu.compute_capability):
        raise DeviceError(
            f"{torch_here}: that is {_architecture(gpu)}, torch is built for {' '.join(architectures)}",
            wanted="a torch for this GPU",
            fix=f"launch/setup --lane k80 for a Tesla K80, otherwise an older torch; {on_cores}",
        )


def _check_horovod_can_use(device: Device, topology: Topology) -> None:
    """Raise DeviceError for a Horovod without NCCL, whose first collective on a GPU would hang silently."""
    from horovod_owt.parallel.runtime import nccl_version  # loads torch

    if not nccl_version():
        raise DeviceError(
            f"Horovod on host {topology.host} is built without NCCL, its ranks have GPUs ({device.gpu.name})",
            wanted="a Horovod for GPUs",
            fix="run `launch/setup` on a host with a GPU, or `launch/setup --lane cuda`; or set "
            "CUDA_VISIBLE_DEVICES= (empty) to train on CPU cores",
        )


def _architecture(gpu: Gpu) -> str:
    return "sm_{}{}".format(*gpu.compute_capability)
