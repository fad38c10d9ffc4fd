"""The options of `bench scaling`, checked before anything slow to import is loaded."""

from __future__ import annotations

import dataclasses
import os
import shutil
from dataclasses import dataclass

import psutil

from horovod_owt.config import TrainConfig, check_batch_norm, resolve
from horovod_owt.errors import ConfigError, OwtError
from horovod_owt.parallel.device import Device
from horovod_owt.perf.machine import Machine, load_machine
from horovod_owt.topology import rank_topology, resolve_group_size
from horovod_owt.train.prepare import choose_device

OURS, PEERS = ("data", "hybrid"), ("ddp", "ddp-tuned")
CLASSES = 1000  # unless the recipe or --set says otherwise


@dataclass(frozen=True)
class Request:
    """What to time, checked as far as one rank can."""

    cfg: TrainConfig
    strategies: tuple[str, ...]
    against: str | None
    steps: int
    warmup: int
    interface: str | None  # whose bytes are counted
    machine: Machine | None  # to predict the rows of
    device: Device


def prepare(
    recipe: str | None,
    settings: tuple[str, ...],
    *,
    strategies: str,
    against: str | None,
    steps: int,
    warmup: int,
    interface: str | None,
    machine: str | None = None,
) -> Request:
    """Check the options before ranks connect; raises OwtError."""
    try:
        for name, value, low in (("steps", steps, 1), ("warmup", warmup, 0)):
            if value < low:
                raise ConfigError(f"--{name} {value}", wanted=f"at least {low}")
        wanted = tuple(dict.fromkeys(word.strip() for word in strategies.split(",")))
        if unknown := [word for word in wanted if word not in OURS]:
            raise ConfigError(f"--strategies {unknown[0]!r}", wanted=" or ".join(OURS))
        if any(setting.partition("=")[0].strip() == "parallel" for setting in settings):
            raise ConfigError("--set parallel", wanted="--strategies, as several are compared")
        if interface and interface not in psutil.net_io_counters(pernic=True):
            known = ", ".join(psutil.net_io_counters(pernic=True))
            raise ConfigError(f"--count-interface {interface}", wanted=f"one of {known}")

        predicted_machine = load_machine(machine, option="--predict") if machine else None
        topology = rank_topology()
        if topology.world_size == 1:
            wanted = tuple(word for word in wanted if word != "hybrid")
        cfg = resolve(recipe, (*settings, f"parallel={'hybrid' if 'hybrid' in wanted else 'data'}"))
        group_size = resolve_group_size(cfg.fc_group_size, topology)
        if "hybrid" in wanted and group_size == 1:
            raise ConfigError(
                f"fc_group_size={cfg.fc_group_size} is one rank: hybrid would equal data",
                wanted="more ranks in a group",
                fix="--set fc_group_size=all",
            )
        cfg = dataclasses.replace(cfg, classes=cfg.classes or CLASSES, fc_group_size=group_size)
        check_batch_norm(cfg, topology.world_size)
        if against:
            refuse_unfit(cfg, against)
        device = choose_device(cfg, topology)
    except OwtError as error:
        error.on_every_rank()
        raise
    return Request(cfg, wanted, against, steps, warmup, interface, predicted_machine, device)


def refuse_unfit(cfg: TrainConfig, against: str) -> None:
    """Raise ConfigError for settings that the baselines cannot match."""
    if cfg.model != "alexnet-owt":
        raise ConfigError(
            f"model={cfg.model} against {against}", wanted="alexnet-owt, which torchvision has too"
        )
    if cfg.accum_steps > 1:
        raise ConfigError(
            f"accum_steps={cfg.accum_steps} against {against}", wanted="1", fix="set batch instead"
        )
    if cfg.optimizer != "sgd":
        raise ConfigError(f"optimizer={cfg.optimizer} against {against}", wanted="sgd", fix="optimizer=sgd")
    if cfg.precision not in ("fp32", "bf16"):
        raise ConfigError(f"precision={cfg.precision} against {against}", wanted="fp32 or bf16")


def refuse_uncompilable(warmup: int) -> None:
    """Raise ConfigError where torch.compile could not be timed."""
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        raise ConfigError(
            f"--against compile: {compiler} not found", wanted="a C++ compiler for torch", fix="set CXX"
        ).on_every_rank()
    if warmup < 1:
        raise ConfigError(
            f"--warmup {warmup} with --against compile", wanted="at least 1: the first step compiles"
        ).on_every_rank()
