"""Predict a job on a machine: the time of a step under each strategy, throughput, memory, bottleneck."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from horovod_owt.compression import keeps_errors
from horovod_owt.config import TrainConfig
from horovod_owt.perf.machine import Machine
from horovod_owt.perf.memory import memory_gb
from horovod_owt.perf.parts import Job, parts_of
from horovod_owt.perf.predict import StepTime, step_time
from horovod_owt.perf.traffic import PASS_BYTES
from horovod_owt.perf.waiting import waiting_s

IMAGENET = 1_281_167  # training images of ILSVRC2012
INEXACT = ("onebit", "powersgd:4")
WORTH = 0.99  # a simpler strategy is preferred if it reaches this share of the best throughput
MAX_GROUP = 64  # ranks that share the FC layers, in a plan


@dataclass(frozen=True)
class Row:
    """The prediction for a job."""

    job: Job
    time: StepTime
    decode_s: float
    host_to_device_s: float
    step_s: float
    images_per_s: float
    memory_gb: float
    efficiency: float
    bound_by: str

    def to_dict(self, images: int = IMAGENET) -> dict[str, Any]:
        cfg = self.job.cfg
        epoch_s = images / self.images_per_s
        run_s = min(epoch_s * cfg.epochs, self.step_s * (cfg.max_steps or math.inf))
        return {
            "nodes": self.job.nodes,
            "gpus": self.job.ranks,
            "strategy": cfg.parallel,
            "owt_scheme": cfg.owt_scheme if cfg.parallel == "hybrid" else None,
            "fc_group_size": cfg.ranks_per_classifier(),
            "gradient_bits": {"fp16": 16, "onebit": 1}.get(cfg.compression, 32),
            "compression": cfg.compression,
            "batch_per_rank": cfg.rank_batch(),
            "step_ms": 1e3 * self.step_s,
            "compute_ms": 1e3 * self.time.compute_s,
            "exchange_ms": 1e3 * self.time.exchange_s,
            "exposed_comm_ms": 1e3 * self.time.exposed_s,
            "decode_ms": 1e3 * self.decode_s,
            "host_to_device_ms": 1e3 * self.host_to_device_s,
            "images_per_s": self.images_per_s,
            "epoch_s": epoch_s,
            "run_h": run_s / 3600,
            "efficiency": self.efficiency,
            "bound_by": self.bound_by,
            "memory_gb": self.memory_gb,
        }


def plan(machine: Machine, job: Job, *, inexact: bool = False) -> list[Row]:
    """A row for data and for each scheme of hybrid, with 32- and 16-bit gradients, at its best group size.

    With `inexact`, also for data with one-bit and rank-4 gradients.
    """
    best: dict[tuple[str, str, str], Row] = {}
    for cfg in _candidates(job.cfg, job.ranks, inexact=inexact):
        row = predict_row(machine, dataclasses.replace(job, cfg=cfg))
        key = (cfg.parallel, cfg.owt_scheme, cfg.compression)
        if key not in best or row.images_per_s > best[key].images_per_s:
            best[key] = row
    return list(best.values())


def fastest(rows: list[Row], machine: Machine) -> Row:
    """The fastest row of those that fit in a device's memory, or of all if none does.

    Rows go from the simplest strategy to the most complex; a gain below 1 % does not justify complexity.
    """
    fitting = [row for row in rows if row.memory_gb <= machine["memory_gb"]]
    most = max(row.images_per_s for row in fitting or rows)
    return next(row for row in fitting or rows if row.images_per_s >= WORTH * most)


def predict_row(machine: Machine, job: Job) -> Row:
    """Predict one job, with its configuration unchanged."""
    step = _step(machine, job)
    alone_cfg = dataclasses.replace(job.cfg, parallel="data", owt_scheme="a", fc_batch="global")
    alone = _step(machine, dataclasses.replace(job, cfg=alone_cfg, nodes=1, ranks_per_node=1))
    images = job.cfg.global_batch(job.ranks)
    images_per_s = images / step.total_s
    return Row(
        job,
        step.time,
        step.decode_s,
        step.host_to_device_s,
        step.total_s,
        images_per_s,
        memory_gb(job.cfg, job.net),
        efficiency=images_per_s / job.ranks / (job.cfg.rank_batch() / alone.total_s),
        bound_by=step.bound_by,
    )


@dataclass(frozen=True)
class _Step:
    time: StepTime
    decode_s: float
    host_to_device_s: float
    total_s: float
    bound_by: str


def _step(machine: Machine, job: Job) -> _Step:
    cfg = job.cfg
    parts = parts_of(machine, job)
    time = step_time(parts, job.net, accum_steps=cfg.accum_steps, overlap=machine["overlap"])
    # a single rank has all decoders of its node, unless these share the ranks' cores
    decode_s = 0.0
    if job.decodes:
        ranks = machine.ranks_per_node if machine.shares_cores else job.ranks_per_node
        decode_s = cfg.rank_batch() * ranks / machine["decode_images_s"]
    copy_rate = 1e9 * machine["host_to_device_gb_s"]
    copied_bytes = cfg.rank_batch() * 3 * job.net.image_size**2 * PASS_BYTES["fp32"]
    host_to_device_s = copied_bytes / copy_rate if copy_rate else 0.0
    work_s = time.total_s + waiting_s(time, parts, cfg, job.ranks, machine["jitter"])
    if machine.shares_cores:
        total_s = work_s + decode_s
    else:
        total_s = max(work_s, decode_s, host_to_device_s)
    shares = {
        "compute": time.compute_s,
        "communication": time.exchange_s + time.exposed_s,
        "decode": decode_s if machine.shares_cores or decode_s == total_s else 0.0,
        "host-to-device": host_to_device_s if host_to_device_s == total_s else 0.0,
    }
    return _Step(time, decode_s, host_to_device_s, total_s, max(shares, key=shares.__getitem__))


def _candidates(cfg: TrainConfig, ranks: int, *, inexact: bool) -> Iterator[TrainConfig]:
    """Every strategy that the configuration allows, data first."""
    compressions: tuple[str, ...] = (cfg.compression,)
    if cfg.compression == "none" and ranks > 1:
        compressions = ("none", "fp16", *(INEXACT if inexact else ()))
    for compression in compressions:
        if keeps_errors(compression):
            if cfg.parallel != "hybrid" and cfg.precision != "fp16":
                yield dataclasses.replace(
                    cfg, compression=compression, parallel="data", owt_scheme="a", fc_batch="global"
                )
            continue
        base = dataclasses.replace(cfg, compression=compression)
        if cfg.parallel != "hybrid" or ranks == 1:
            yield dataclasses.replace(base, parallel="data", owt_scheme="a", fc_batch="global")
        if cfg.parallel == "data" or cfg.precision == "fp16":
            continue
        for scheme in ("a", "b"):
            if scheme == "b" and (cfg.sync_bn or ranks == 1):
                continue
            for size in group_sizes(cfg, ranks):
                yield dataclasses.replace(
                    base,
                    parallel="hybrid",
                    owt_scheme=scheme,
                    fc_group_size=size,
                    fc_batch=cfg.fc_batch if scheme == "b" else "global",
                )


def group_sizes(cfg: TrainConfig, ranks: int) -> list[int]:
    """The group size set by the user, or all that divide the number of ranks."""
    if isinstance(cfg.fc_group_size, int):
        return [cfg.fc_group_size] if ranks % cfg.fc_group_size == 0 and cfg.fc_group_size > 1 else []
    return [size for size in range(2, min(ranks, MAX_GROUP) + 1) if ranks % size == 0]
