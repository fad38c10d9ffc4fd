"""Predict a job on a machine: the time of a step under each strategy, and what follows from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from horovod_owt.compression import keeps_errors, powersgd_rank
from horovod_owt.config import TrainConfig
from horovod_owt.perf.layers import Net
from horovod_owt.perf.machine import Machine
from horovod_owt.perf.memory import memory_gb
from horovod_owt.perf.predict import Parts, StepTime, Sum, step_time
from horovod_owt.perf.traffic import PASS_BYTES, exchanged, fc_gradients
from horovod_owt.perf.waiting import waiting_s

IMAGENET = 1_281_167  # training images of ILSVRC2012
FC_PASSES = 3  # over the classifier's weights: forward, input gradient, weight gradient
UPDATE_PASSES = 5  # over 4 bytes a weight: read weight, gradient and momentum, write weight and momentum
WEIGHT_BYTES = 4
# The same of compressed gradients, from their time on a CPU beside that of an addition; see parallel.one_bit.
QUANTISE_PASSES, DEQUANTISE_PASSES = 21, 10
LOW_RANK_PASSES = 10  # add the error, two products, the approximation, the new error
INEXACT = ("onebit", "powersgd:4")
WORTH = 0.99
MAX_GROUP = 64  # ranks that share the FC layers, in a plan


@dataclass(frozen=True)
class Job:
    """A configuration with `parallel` and `fc_group_size` resolved, on so many ranks."""

    cfg: TrainConfig
    net: Net
    nodes: int
    ranks_per_node: int
    decodes: bool = True  # JPEGs, not images that are there already
    two_level: bool = False

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Row:
    """What is predicted of a job."""

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
            "run_h": epoch_s * cfg.epochs / 3600,
            "efficiency": self.efficiency,
            "bound_by": self.bound_by,
            "memory_gb": self.memory_gb,
        }


def plan(machine: Machine, job: Job, *, inexact: bool = False) -> list[Row]:
    """A row for data and for each scheme of hybrid, with 32- and 16-bit gradients, at its best group size.

    With `inexact` also for data with gradients in one bit and of rank 4.
    """
    best: dict[tuple[str, str, str], Row] = {}
    for cfg in _candidates(job.cfg, job.ranks, inexact=inexact):
        row = predict_row(machine, dataclasses.replace(job, cfg=cfg))
        key = (cfg.parallel, cfg.owt_scheme, cfg.compression)
        if key not in best or row.images_per_s > best[key].images_per_s:
            best[key] = row
    return list(best.values())


def fastest(rows: list[Row], machine: Machine) -> Row:
    """The row with most images/s among those that fit a device's memory; of all, if none does.

    Rows go from the simplest to the least simple, and a gain below 1 % is not worth it.
    """
    fitting = [row for row in rows if row.memory_gb <= machine["memory_gb"]]
    most = max(row.images_per_s for row in fitting or rows)
    return next(row for row in fitting or rows if row.images_per_s >= WORTH * most)


def predict_row(machine: Machine, job: Job) -> Row:
    """One job as it is."""
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


def parts_of(machine: Machine, job: Job) -> Parts:
    """The parts of a step by the machine's figures."""
    cfg, net, ranks = job.cfg, job.net, job.ranks
    group_size = cfg.ranks_per_classifier()
    links = machine.links(job.ranks_per_node)
    speedup = machine["speedup_16"] if cfg.precision in ("bf16", "fp16") else 1.0
    conv_rate, fc_rate = (1e9 * speedup * machine[key] for key in ("conv_gflops", "fc_gflops"))
    convs = [layer for layer in net.layers() if layer.kind == "conv"]
    turns = group_size if cfg.owt_scheme == "b" else 1
    shard = net.parameters("fc") / group_size
    memory_rate = 1e9 * machine["memory_gb_s"]
    classifier_s = (
        net.flops("fc") * cfg.batch / fc_rate + FC_PASSES * turns * shard * WEIGHT_BYTES / memory_rate
    )
    gradient_bytes = 2 if cfg.compression == "fp16" else WEIGHT_BYTES
    compressed = _compressed(machine, job) if keeps_errors(cfg.compression) and ranks > 1 else None
    updates = group_size * cfg.accum_steps if cfg.fc_batch == "local" else 1
    return Parts(
        conv_forward_s=1e-3 * machine["fixed_ms"]
        + cfg.batch * sum(layer.forward_flops for layer in convs) / conv_rate,
        conv_backward_s=cfg.batch * sum(layer.backward_flops for layer in convs) / conv_rate,
        classifier_s=classifier_s,
        exchange_s=_exchange_s(machine, job, compute_s=classifier_s / turns),
        update_s=UPDATE_PASSES
        * WEIGHT_BYTES
        * (net.parameters("conv") + updates * shard)
        / memory_rate
        + (compressed.compute_s if compressed else 0.0),
        conv_sum=links.allreduce(
            net.parameters("conv") * gradient_bytes, ranks, two_level=job.two_level
        ),
        fc_sum=compressed.first if compressed else links.allreduce(
            shard * gradient_bytes * updates,
            ranks // group_size,
            rings=group_size,
            two_level=job.two_level,
        ),
        fc_reply_s=compressed.reply.total_s if compressed else 0.0,
    )  # fmt: skip


@dataclass(frozen=True)
class _Compressed:
    """The FC layers' gradients, compressed: what may overlap with the backward pass, and what follows it."""

    first: Sum
    reply: Sum
    compute_s: float


def _compressed(machine: Machine, job: Job) -> _Compressed:
    """Half of the bytes travel before the other half: rows to their owners and back, or P and then Q."""
    cfg, net, ranks = job.cfg, job.net, job.ranks
    links = machine.links(job.ranks_per_node)
    sent = fc_gradients(dataclasses.replace(cfg, classes=net.classes), net.parameters("fc"), ranks)
    if powersgd_rank(cfg.compression):
        buffer_bytes = sent / 2 / (2 * (ranks - 1) / ranks)
        half = links.allreduce(buffer_bytes, ranks, two_level=job.two_level)
        passes = LOW_RANK_PASSES
    else:
        half = links.exchange(sent / 2, ranks - 1, ranks)
        passes = QUANTISE_PASSES * (1 + 1 / ranks) + 2 * DEQUANTISE_PASSES
    memory_rate = 1e9 * machine["memory_gb_s"]
    return _Compressed(half, half, passes * WEIGHT_BYTES * net.parameters("fc") / memory_rate)


def _exchange_s(machine: Machine, job: Job, *, compute_s: float) -> float:
    """Seconds that a micro-batch waits for transfers inside its fc_group.

    Scheme b sends the features of one rank at a time, behind the `compute_s` of the turn before; the first
    transfer forward and the last one back stay exposed, and so does what keeps the cores busy.
    """
    cfg, size = job.cfg, job.cfg.ranks_per_classifier()
    if size == 1:
        return 0.0
    links, pass_bytes = machine.links(job.ranks_per_node), PASS_BYTES[cfg.precision]
    sent = exchanged(cfg.batch, job.net.classes, size, pass_bytes=pass_bytes)
    features = sent["features"]
    inner = sum(sent[name] for name in ("fc7 units", "logits", "fc7 units back"))
    hop = size - 1  # messages of a gather or an alltoall; a ring sum has twice as many
    if cfg.owt_scheme == "a":
        return links.exchange(2 * features + inner, 6 * hop, size).total_s
    inner_s = links.exchange(inner, size * 4 * hop, size).total_s
    to_all = links.exchange(features / hop, hop, size)  # a pipelined broadcast
    to_owner = links.exchange(features, hop, size)
    exposed_s = 0.0
    for turn in (to_all, to_owner):
        exposed_s += turn.wire_s + (size - 1) * max(0.0, turn.wire_s - compute_s) + size * turn.busy_s
    return inner_s + exposed_s


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
    # a rank alone has the decoders of its whole node, but not its cores
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
    """The one that the user chose, or all that divide the ranks."""
    if isinstance(cfg.fc_group_size, int):
        return [cfg.fc_group_size] if ranks % cfg.fc_group_size == 0 and cfg.fc_group_size > 1 else []
    return [size for size in range(2, min(ranks, MAX_GROUP) + 1) if ranks % size == 0]
