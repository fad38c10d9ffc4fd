"""Compare strategies in one job: data-parallel, hybrid, a single rank and, on request, torch's DDP.

Machines are noisy, so figures from different runs cannot be compared. Here all contenders take turns in short
blocks, and their lower quartiles are compared.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from horovod_owt.bench.blocks import alternate, figures, method, seconds_by_rank
from horovod_owt.bench.contenders import HelperProcess, Name, build
from horovod_owt.bench.ddp_loop import free_init_method
from horovod_owt.bench.request import OURS, PEERS, Request
from horovod_owt.errors import ConfigError
from horovod_owt.parallel import runtime
from horovod_owt.parallel.collectives import gather_objects, on_root, sum_over_ranks
from horovod_owt.parallel.runtime import World
from horovod_owt.perf.calibrate import fit_steps, measured
from horovod_owt.perf.layers import net_of
from horovod_owt.perf.parts import Job
from horovod_owt.perf.plan import predict_row
from horovod_owt.train.replica import StepReport

log = logging.getLogger(__name__)
PREDICTED = "one rank: by the machine file; several: with the rate and jitter of this run's one-rank row"


def bench_scaling(request: Request) -> dict[str, Any] | None:
    """Time every contender; returns the report on rank 0, else None."""
    cfg = request.cfg
    # Gloo times out after 30 s by default, and ranks are stopped for longer while the helper process runs
    os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", str(int(cfg.stall_limit_s)))
    world = runtime.init(request.device, stall_limit_s=cfg.stall_limit_s, fc_group_size=cfg.fc_group_size)
    runtime.check_devices(request.device, world)
    init_method = None
    if request.against and world.size > 1:
        init_method = on_root(free_init_method, "bench.init_method")
    helper, meter = HelperProcess(cfg, world, init_method), _Meter(world, request.interface)
    reports = alternate(
        _contenders(request, world, helper),
        world,
        steps=request.steps,
        warmup=request.warmup,
        timed_block=meter.timed_block,
    )
    report = _report(request, world, reports, meter)
    helper.close()
    runtime.shutdown()
    return report if world.is_root else None


def _contenders(
    request: Request, world: World, helper: HelperProcess
) -> dict[Name, Callable[[range], list[StepReport]]]:
    """On all ranks: baselines, then ours. On rank 0 alone, while the others wait: baselines, then `data`."""
    peers = PEERS if request.against else ()

    def here(name: Name) -> Callable[[range], list[StepReport]]:
        train_step = build(name, request.cfg, world)
        return lambda steps: [train_step(step) for step in steps]

    def in_helper(name: Name) -> Callable[[range], list[StepReport]]:
        takes_part = world.is_root or name.ranks > 1
        return lambda steps: helper.run(name, steps) if takes_part else []

    contenders = {}
    if world.size > 1:
        contenders |= {name: in_helper(name) for name in (Name(peer, world.size) for peer in peers)}
        contenders |= {name: here(name) for name in (Name(ours, world.size) for ours in request.strategies)}
    return contenders | {
        name: in_helper(name) for name in (Name(strategy, 1) for strategy in (*peers, "data"))
    }


class _Meter:
    """Separates the contenders' blocks, and counts the bytes that the kernel sends on an interface."""

    def __init__(self, world: World, interface: str | None) -> None:
        self._interface = interface
        self._counts = interface is not None and world.local_rank == 0  # once per host
        self._bytes: dict[Name, int] = {}

    @contextmanager
    def timed_block(self, name: Name) -> Iterator[None]:
        """From when all ranks are ready until all are done. Ranks without work sleep in the meantime."""
        _wait_for_all("bench.begin")
        before = self._sent()
        yield
        _wait_for_all("bench.end")
        self._bytes[name] = self._bytes.get(name, 0) + self._sent() - before

    def bytes_sent(self) -> dict[Name, int]:
        """Bytes sent by all hosts in all timed blocks; every rank must call it."""
        by_rank = gather_objects(self._bytes, "bench.bytes")
        return {name: sum(counted[name] for counted in by_rank) for name in self._bytes}

    def _sent(self) -> int:
        # psutil reads /proc/net/dev, which unlike /sys/class/net is per network namespace
        return psutil.net_io_counters(pernic=True)[self._interface].bytes_sent if self._counts else 0


def _wait_for_all(name: str) -> None:
    sum_over_ranks(torch.zeros(1), name)


def _report(
    request: Request, world: World, reports: dict[Name, list[StepReport]], meter: _Meter
) -> dict[str, Any]:
    cfg, seconds, wire = request.cfg, seconds_by_rank(reports), meter.bytes_sent()
    rows = []
    for name, taken in seconds.items():
        images = cfg.global_batch(name.ranks)
        row = {
            "strategy": name.strategy,
            "precision": cfg.precision,
            "ranks": name.ranks,
            "batch_per_rank": cfg.rank_batch(),
            **figures(taken, images),
        }
        row["images_per_s_p25"] = 1e3 * images / row["step_ms"]["p25"]
        if name.strategy in OURS:
            totals = taken.sum(axis=(0, 1))
            # other ranks have no steps of contenders on rank 0, and make no report
            row["bytes_sent_per_step"] = sum(reports[name][-1].bytes_sent.values()) if world.is_root else 0
            row["exposed_comm_share"] = totals[2] / totals[0]
        if request.interface:
            row["wire_bytes_per_step"] = wire[name] / (request.steps * name.ranks)
        rows.append(row)
    if request.machine:
        _predict(request, world, rows)
    alone = _images_per_s(rows, "data", 1)
    for row in rows:
        row["efficiency"] = row["images_per_s_p25"] / (row["ranks"] * alone)
    return {
        "rows": rows,
        "ratios": _ratios(rows, world.size),
        "method": {
            **method(cfg, world, warmup=request.warmup),
            "steps": request.steps,
            "step_time": "of the slowest rank; ratios and efficiency at the lower quartile (p25)",
            "images": "random, the same in every step: decoding is not measured",
            "one_rank": "rank 0 while the others sleep",
            "processes": "ddp, ddp-tuned and one rank run without Horovod, whose processes are stopped then",
            "efficiency": "images/s divided by ranks times the images/s of data on one rank",
            "ddp": "torchvision's alexnet, DistributedDataParallel, contiguous tensors, default SGD",
            "ddp-tuned": "the same with channels_last, fused SGD, gradient_as_bucket_view, static_graph",
            "classes": cfg.classes,
            "fc_group_size": cfg.fc_group_size,
            "owt_scheme": cfg.owt_scheme,
            "fc_batch": cfg.fc_batch,
            "hosts": gather_objects(world.host, "bench.hosts"),
            "counted_interface": request.interface,
            **({"predicted": PREDICTED} if request.machine else {}),
        },
    }


def _predict(request: Request, world: World, rows: list[dict[str, Any]]) -> None:
    """Add `owt plan`'s prediction to our rows: for one rank, by the machine file alone.

    The speed of cores drifts by more than the planner's error, so rows of several ranks are predicted with
    the convolutions' rate and the jitter of this run's one-rank row.
    """
    net = net_of(request.cfg.model, classes=request.cfg.classes, image_size=request.cfg.image_size)
    ours = [row for row in rows if row["strategy"] in OURS]
    calibrated = request.machine
    for row in sorted(ours, key=lambda row: row["ranks"]):
        cfg = dataclasses.replace(request.cfg, parallel=row["strategy"])
        if row["strategy"] == "data":
            cfg = dataclasses.replace(cfg, fc_batch="global", owt_scheme="a")
        machine = request.machine if row["ranks"] == 1 else calibrated
        per_node = min(world.local_size, row["ranks"])
        job = Job(cfg, net, row["ranks"] // per_node, per_node, decodes=False)
        row["predicted_step_ms"] = 1e3 * predict_row(machine, job).step_s
        if row["ranks"] == 1:
            try:
                calibrated = fit_steps(machine, [measured(cfg, row)], net, source="this run")
            except ConfigError as error:
                if world.is_root:
                    log.warning("the predictions do not use this run's one-rank row: %s", error)


def _images_per_s(rows: list[dict[str, Any]], strategy: str, ranks: int) -> float | None:
    """images/s at the lower quartile; None if there is no such row."""
    found = (r["images_per_s_p25"] for r in rows if (r["strategy"], r["ranks"]) == (strategy, ranks))
    return next(found, None)


def _ratios(rows: list[dict[str, Any]], ranks: int) -> dict[str, float]:
    """Ratios of images/s at the lower quartiles, for the pairs of interest."""
    pairs = [(a, b, ranks) for a in OURS for b in PEERS] if ranks > 1 else []
    pairs += [("hybrid", "data", ranks), ("data", "ddp", 1), ("data", "ddp-tuned", 1)]
    ratios = {}
    for ours, theirs, n in pairs:
        fast, slow = _images_per_s(rows, ours, n), _images_per_s(rows, theirs, n)
        if fast and slow:
            ratios[f"{ours}/{theirs}" + (" on one rank" if n == 1 else "")] = fast / slow
    for strategy in OURS:
        if ranks > 1 and (together := _images_per_s(rows, strategy, ranks)):
            ratios[f"{strategy} per rank/data on one rank"] = (
                together / ranks / _images_per_s(rows, "data", 1)
            )
    return ratios


def _prediction(row: dict[str, Any]) -> list[str]:
    """The predicted median, and how far it is from the measured one."""
    if "predicted_step_ms" not in row:
        return ["-", "-"]
    off = row["predicted_step_ms"] / row["step_ms"]["median"] - 1
    return [f"{row['predicted_step_ms']:.1f}", f"{off:+.0%}"]


def format_scaling_report(report: dict[str, Any]) -> str:
    """The report as text."""
    rows, method = report["rows"], report["method"]
    counted = "wire_bytes_per_step" in rows[0]
    table = [["strategy", "ranks", "images/s", "min ms", "p25", "median", "p75", "efficiency", "MB sent"]]
    table[0] += ["exposed comm", "MB on the wire"] if counted else ["exposed comm"]
    predicts = any("predicted_step_ms" in row for row in rows)
    table[0] += ["predicted ms", "off"] if predicts else []
    for row in rows:
        ours, step_ms = row["strategy"] in OURS, row["step_ms"]
        line = [row["strategy"], str(row["ranks"]), f"{row['images_per_s_p25']:.1f}"]
        line += [f"{step_ms[key]:.1f}" for key in ("min", "p25", "median", "p75")]
        line += [f"{row['efficiency']:.2f}", f"{row['bytes_sent_per_step'] / 1e6:.1f}" if ours else "-"]
        line += [f"{row['exposed_comm_share']:.1%}" if ours else "-"]
        line += [f"{row['wire_bytes_per_step'] / 1e6:.1f}"] if counted else []
        if predicts:
            line += _prediction(row)
        table.append(line)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        f"{method['model']}, {rows[0]['precision']}, {rows[0]['batch_per_rank']} images of "
        f"{method['image_size']} px per rank, fc_group_size {method['fc_group_size']}, scheme "
        f"{method['owt_scheme']}, {method['device']}, {method['threads_per_rank']} threads per rank",
        "",
        *(
            "  ".join(
                cell.rjust(width) if number else cell.ljust(width)
                for number, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in table
        ),
        "",
        *(f"{ratio:6.2f}  {name}" for name, ratio in report["ratios"].items()),
        "",
        f"images/s, efficiency and ratios at the lower quartile of the slowest rank's steps; "
        f"{method['warmup_steps']} warm-up steps, {method['steps']} timed in blocks of "
        f"{method['block_steps']}, contenders in turn; bytes per rank and step",
        f"images {method['images']}",
        *([f"predicted: {method['predicted']}; off: of the median"] if predicts else []),
        ", ".join(f"{name} {version}" for name, version in method["versions"].items()),
    ]
    return "\n".join(lines)
