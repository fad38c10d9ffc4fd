"""This machine's peak rates next to those training reaches, measured in the same run.

All ranks measure at the same time, as in training, and each figure is the slowest rank's. A ceiling is the
best of several plain operations; a reached figure is the median of ours.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from horovod_owt.bench.blocks import heading, method
from horovod_owt.bench.contenders import random_batch
from horovod_owt.bench.images import given_or_synthetic
from horovod_owt.bench.input_contenders import open_decoder, open_ours
from horovod_owt.bench.shared_sum import shared_sum_s
from horovod_owt.bench.tcp_ring import TcpRing, open_server, pair_on_this_host, time_ring
from horovod_owt.compression import keeps_errors
from horovod_owt.config import TrainConfig
from horovod_owt.errors import ConfigError
from horovod_owt.parallel import runtime
from horovod_owt.parallel.collectives import gather_objects
from horovod_owt.parallel.interfaces import listening_addresses
from horovod_owt.parallel.parts import measure_parts, time_classifier, time_each
from horovod_owt.parallel.products import times_weight
from horovod_owt.parallel.runtime import World
from horovod_owt.parallel.step import DTYPES, configure_backends
from horovod_owt.perf.layers import Net, net_of
from horovod_owt.perf.parts import FC_PASSES, UPDATE_PASSES, WEIGHT_BYTES
from horovod_owt.perf.predict import Parts
from horovod_owt.train.prepare import Request, prepare_request
from horovod_owt.train.replica import Replica

CLASSES = 1000
SQUARES = (1024, 2048)  # sides of the matrices
COPY_BYTES = 256 << 20  # more than any cache
RING_WORK = [(64 << 20, 5), (4 << 10, 50)]  # bytes and repeats: for bandwidth, for latency
FEW_ROWS = 8  # batch so small that reading the classifier's weights from memory takes most of the time
REPEATS = 5
DECODED, DECODED_UNTIMED = 12, 6  # batches

log = logging.getLogger(__name__)


def bench_ceilings(
    data: Path | None, recipe: str | None, settings: tuple[str, ...], *, steps: int
) -> dict[str, Any] | None:
    """Rows of reached and ceiling, and the figures for a machine file; returns the report on rank 0."""
    with given_or_synthetic(data) as root, ExitStack() as keep:
        if data is None:
            settings = (f"classes={CLASSES}", *settings)
        request = prepare_request(root, recipe, settings)
        if keeps_errors(request.cfg.compression):
            raise ConfigError(
                f"compression={request.cfg.compression}, but the ceilings are of uncompressed gradients",
                wanted="none or fp16",
                fix="--set compression=none; `owt bench step` times compressed ones",
            ).on_every_rank()
        cfg = dataclasses.replace(request.cfg, parallel="data", fc_batch="global", owt_scheme="a")
        world = runtime.init(request.device, stall_limit_s=cfg.stall_limit_s)
        runtime.check_devices(request.device, world)
        measured = _measure(dataclasses.replace(request, cfg=cfg), world, root, keep, steps=steps)
        report = _report(cfg, world, measured)
    runtime.shutdown()
    return report if world.is_root else None


@dataclasses.dataclass(frozen=True)
class Measured:
    """Rates of the slowest rank; seconds are medians, ceilings are bests."""

    matrix_gflops: float
    convolution_gflops: float
    memory_gb_s: float
    ring_s: float  # of RING_WORK's large buffer
    shared_s: float | None  # of the same through shared memory, where all ranks are CPU cores of one host
    ring_latency_s: float  # of a message
    decode_images_s: float
    parts: Parts
    few_rows_s: float
    step_s: list[float]
    input_images_s: float


def _measure(request: Request, world: World, root: Path, keep: ExitStack, *, steps: int) -> Measured:
    cfg = request.cfg

    def logged(what: str, value: Any) -> Any:
        if world.is_root:
            log.info("%s: done", what)
        return value

    configure_backends(cfg)  # so that the ceilings are measured at the step's precision
    ring_s, latency_s = logged("TCP ring", _ring(world))
    return Measured(
        matrix_gflops=logged("matrix products", matrix_gflops(cfg, world)),
        convolution_gflops=logged("convolutions", convolution_gflops(cfg, world)),
        memory_gb_s=logged("memory", _memory_gb_s(world)),
        ring_s=ring_s,
        shared_s=logged("sum through shared memory", _shared_s(world)),
        ring_latency_s=latency_s,
        parts=logged("parts of a step", measure_parts(cfg, world, {"data": 1})["data"]),
        few_rows_s=time_classifier(dataclasses.replace(cfg, batch=FEW_ROWS), world, group_size=1)["passes"],
        step_s=logged("steps", training_steps(cfg, world, steps)),
        decode_images_s=logged("decoding", _images_s(open_decoder(cfg, root, world.threads, keep), cfg)),
        input_images_s=logged("input", _input_images_s(request, world, keep)),
    )


def _best_s(action, world: World) -> float:
    return min(time_each(action, world, repeats=REPEATS))


def matrix_gflops(cfg: TrainConfig, world: World) -> float:
    """The best rate of the products of square matrices."""
    rates = []
    for side in SQUARES:
        a, b = (torch.randn(side, side, device=world.device).to(DTYPES[cfg.precision]) for _ in range(2))
        for product in (torch.matmul, times_weight):  # the latter may use another library
            seconds = _best_s(lambda a=a, b=b, product=product: product(a, b), world)
            rates.append(2 * side**3 / seconds / 1e9)
    return max(rates)


def convolution_gflops(cfg: TrainConfig, world: World) -> float:
    """The best rate of the forward passes of the model's own convolutions, without conv1."""
    rates, net = [], _net(cfg)
    for layer, (c_in, c_out, kernel) in list(zip(net.layers(), net.convolutions, strict=False))[1:]:
        side = math.isqrt(layer.outputs // c_out)  # of input and output: all but conv1 keep it
        x = torch.randn(cfg.batch, c_in, side, side, device=world.device).to(DTYPES[cfg.precision])
        weight = torch.randn(c_out, c_in, kernel, kernel, device=world.device).to(x.dtype)
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
        seconds = _best_s(lambda x=x, w=weight, k=kernel: F.conv2d(x, w, padding=k // 2), world)
        rates.append(cfg.batch * layer.forward_flops / seconds / 1e9)
    return max(rates)


def _memory_gb_s(world: World) -> float:
    """Bytes read and written per second by the faster of a copy and an in-place scaling.

    The update works in place. A CPU reads memory before it overwrites it (write-allocate), so a copy moves
    more bytes than are counted.
    """
    source = torch.zeros(COPY_BYTES // 4, device=world.device)
    target = torch.zeros_like(source)
    actions = (lambda: target.copy_(source), lambda: target.mul_(2))
    return 2 * COPY_BYTES / min(_best_s(action, world) for action in actions) / 1e9


def _ring(world: World) -> tuple[float, float]:
    """Seconds of a large allreduce, and of one message. A single rank starts a second process as its peer."""
    if world.size == 1:
        with pair_on_this_host(RING_WORK) as run:
            large, small = run()
        messages = 2
    else:
        ip, *_ = listening_addresses(os.environ, one_host=world.local_size >= world.size)
        with open_server(ip) as server:
            addresses = gather_objects(server.getsockname()[:2], "ceilings.addresses")
            ring = TcpRing(world.rank, addresses, server)
            mine = [
                time_ring(ring, size // world.size * world.size, repeats=repeats)
                for size, repeats in RING_WORK
            ]
            ring.close()
        everyone = gather_objects(mine, "ceilings.ring")
        large, small = (
            [max(times) for times in zip(*each, strict=True)] for each in zip(*everyone, strict=True)
        )
        messages = 2 * (world.size - 1)
    return min(large), min(small) / messages


def _shared_s(world: World) -> float | None:
    """Seconds of a large sum through shared memory, as Horovod sums there between CPU ranks."""
    if world.size == 1 or world.local_size < world.size or world.device.type != "cpu":
        return None
    size, repeats = RING_WORK[0]
    seconds = shared_sum_s(world, size, repeats=repeats)
    return min(seconds) if seconds else None


def training_steps(cfg: TrainConfig, world: World, steps: int) -> list[float]:
    """Seconds of each of `steps` data-parallel training steps on random images, on its slowest rank."""
    replica, batch = Replica(cfg, world), random_batch(cfg, world)
    images = cfg.global_batch(world.size)
    seconds = []
    for step in range(2 + steps):
        report = replica.train_step(lambda: batch, consumed=step * images, lr=1e-4)
        seconds.append(report.step_s)
    everyone = gather_objects(seconds[2:], "ceilings.steps")
    return [max(times) for times in zip(*everyone, strict=True)]


def _input_images_s(request: Request, world: World, keep: ExitStack) -> float:
    cfg = dataclasses.replace(request.cfg, decode_threads=request.cfg.decode_threads or world.threads)
    return _images_s(open_ours(cfg, request.folder.train, world.device, keep), cfg)


def _images_s(source: Iterator[Tensor | int], cfg: TrainConfig) -> float:
    """Images/s of the slowest rank while all decode."""
    for _ in range(DECODED_UNTIMED):
        next(source)
    start = perf_counter()
    for _ in range(DECODED):
        next(source)
    mine = DECODED * cfg.batch / (perf_counter() - start)
    return min(gather_objects(mine, "ceilings.images"))


def _net(cfg: TrainConfig) -> Net:
    return net_of(cfg.model, classes=cfg.classes, image_size=cfg.image_size)


def _report(cfg: TrainConfig, world: World, got: Measured) -> dict[str, Any]:
    net, parts, batch = _net(cfg), got.parts, cfg.batch
    conv_s, step_s = parts.conv_forward_s + parts.conv_backward_s, median(got.step_s)
    update_gb_s = UPDATE_PASSES * WEIGHT_BYTES * net.parameters("fc") / parts.update_s / 1e9
    best_gflops = max(got.matrix_gflops, got.convolution_gflops)
    rows = [
        _row("convolutions", net.flops("conv") * batch / conv_s / 1e9, got.convolution_gflops, "GFLOP/s"),
        _row("FC layers", net.flops("fc") * batch / parts.classifier_s / 1e9, got.matrix_gflops, "GFLOP/s"),
        _row("update", update_gb_s, got.memory_gb_s, "GB/s"),
        _row("input", got.input_images_s, got.decode_images_s, "images/s"),
        _row("step", net.flops() * cfg.rank_batch() / step_s / 1e9, best_gflops, "GFLOP/s"),
    ]
    ring_size = max(2, world.size)
    ring_sent = 2 * (ring_size - 1) / ring_size * RING_WORK[0][0]
    ring_gb_s = ring_sent / got.ring_s / 1e9
    allreduce_s = parts.conv_sum.total_s + parts.fc_sum.total_s
    if world.size > 1:
        sent = 2 * (world.size - 1) / world.size * WEIGHT_BYTES * net.parameters()
        best_s = min(got.ring_s, got.shared_s or math.inf)
        rows.append(_row("allreduce", sent / allreduce_s / 1e9, ring_sent / best_s / 1e9, "GB/s"))
    else:
        rows.append(_row("allreduce", None, ring_gb_s, "GB/s"))
    return {
        "rows": rows,
        "figures": _figures(cfg, world, got, net, ring_gb_s=ring_gb_s, update_gb_s=update_gb_s),
        "method": {
            **method(cfg, world, warmup=2),
            "classes": cfg.classes,
            "batch_per_rank": cfg.rank_batch(),
            "precision": cfg.precision,
            "ranks": world.size,
            "hosts": gather_objects(world.host, "ceilings.hosts"),
            "step_ms": [1e3 * s for s in got.step_s],
            "ceilings": {
                "convolutions": "the best of the model's own convolutions, forward",
                "FC layers": f"the best product of square matrices of side {' or '.join(map(str, SQUARES))}",
                "update": f"the better of copying and scaling {COPY_BYTES >> 20} MB, bytes read and written",
                "input": "decoding the same JPEGs, without crops and normalisation",
                "allreduce": _allreduce_ceiling(world, got),
                "step": "the better of the first two",
            },
        },
    }


def _allreduce_ceiling(world: World, got: Measured) -> str:
    if world.size == 1:
        return "a plain TCP ring of this rank and a second process"
    if got.shared_s is None or got.ring_s < got.shared_s:
        return "a plain TCP ring"
    return "the copies and additions of a sum through shared memory"


def _figures(
    cfg: TrainConfig, world: World, got: Measured, net: Net, *, ring_gb_s: float, update_gb_s: float
) -> dict[str, float]:
    """The figures of a machine file that one rank can measure, for `owt plan --calibrate`.

    The FC layers' arithmetic is the time that a full batch takes beyond one of FEW_ROWS.
    """
    conv_s = got.parts.conv_forward_s + got.parts.conv_backward_s
    few_s, all_s = got.few_rows_s, got.parts.classifier_s
    weights_s = FC_PASSES * WEIGHT_BYTES * net.parameters("fc") / update_gb_s / 1e9
    if cfg.batch > FEW_ROWS and all_s > few_s:
        fc_gflops = net.flops("fc") * (cfg.batch - FEW_ROWS) / (all_s - few_s) / 1e9
    else:
        fc_gflops = net.flops("fc") * cfg.batch / max(0.1 * all_s, all_s - weights_s) / 1e9
    figures = {
        "fc_gflops": min(fc_gflops, got.matrix_gflops),  # the difference of two times is noisy
        "memory_gb_s": update_gb_s,
        "decode_images_s": got.input_images_s
        * world.size
        / len(set(gather_objects(world.host, "ceilings.h"))),
        "conv_gflops": net.flops("conv") * cfg.batch / conv_s / 1e9,
        "jitter": float(np.std(got.step_s) / np.mean(got.step_s)),
    }
    if world.device.type == "cpu":
        figures["core_gb_s"] = ring_gb_s
        figures["link_us"] = 1e6 * got.ring_latency_s
    if world.size == 1:
        modelled_s = conv_s + all_s + got.parts.update_s
        rest_s = median(got.step_s) - modelled_s
        figures["fixed_ms"] = 1e3 * max(0.0, rest_s)
    return figures


def _row(what: str, reached: float | None, ceiling: float, unit: str) -> dict[str, Any]:
    share = None if reached is None else reached / ceiling
    return {"what": what, "reached": reached, "ceiling": ceiling, "unit": unit, "share": share}


def format_ceilings_report(report: dict[str, Any]) -> str:
    """The report as text."""
    method = report["method"]
    lines = [
        heading(report),
        "",
        f"{'':14}{'reached':>10}{'ceiling':>10}  {'':10}{'share':>6}  ceiling is",
    ]
    for row in report["rows"]:
        reached = "-" if row["reached"] is None else f"{row['reached']:.4g}"
        share = "-" if row["share"] is None else f"{row['share']:.0%}"
        lines.append(
            f"{row['what']:14}{reached:>10}{row['ceiling']:10.4g}  {row['unit']:10}{share:>6}  "
            f"{method['ceilings'][row['what']]}"
        )
    lines += ["", "of the slowest rank while all ranks do the same; reached: medians, ceilings: bests"]
    lines.append(", ".join(f"{name} {version}" for name, version in method["versions"].items()))
    return "\n".join(lines)
