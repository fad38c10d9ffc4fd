"""Training steps, timed: ours on real JPEGs and, on request, a plain loop beside it in alternating blocks."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from horovod_owt.bench.plain_loop import PlainLoop
from horovod_owt.config import TrainConfig
from horovod_owt.data.synthetic import write_synthetic
from horovod_owt.parallel import runtime
from horovod_owt.parallel.collectives import gather_objects
from horovod_owt.parallel.runtime import World
from horovod_owt.train.pipelines import training_pipeline
from horovod_owt.train.prepare import prepare_alone
from horovod_owt.train.replica import Replica, StepReport

BLOCK = 5  # steps of one contender before the other's turn: short, so that both meet the same noise
CLASSES = 1000  # of the net that is timed when no data set is given
SYNTHETIC = {"classes": 10, "train_per_class": 20, "val_per_class": 1, "size": (300, 400)}  # ImageNet's sizes


def bench_step(
    data: Path | None,
    recipe: str | None,
    settings: tuple[str, ...],
    *,
    steps: int,
    warmup: int,
    against: str | None,
) -> dict[str, Any] | None:
    """Time `steps` steps of each contender after `warmup` untimed ones; the report on rank 0, else None."""
    with _data_or_synthetic(data) as root:
        if data is None:
            settings = (f"classes={CLASSES}", *settings)
        request = prepare_alone(root, recipe, settings)
        cfg = request.cfg
        world = runtime.init(
            request.device, stall_limit_s=cfg.stall_limit_s, fc_group_size=int(cfg.fc_group_size)
        )
        with training_pipeline(request.cfg, request.folder, world) as batches:
            replica = Replica(request.cfg, world)
            contenders = {
                "ours": lambda step: replica.train_step(
                    batches.__next__, consumed=step * cfg.global_batch(world.size), lr=1e-4
                )
            }
            if against == "plain":
                contenders["plain"] = PlainLoop(request.cfg, world).train_step
            reports = _alternate(contenders, steps=steps, warmup=warmup)
        report = _summary(request.cfg, world, replica, reports, warmup=warmup)
    runtime.shutdown()
    return report if world.is_root else None


def _alternate(
    contenders: dict[str, Callable[[int], StepReport]], *, steps: int, warmup: int
) -> dict[str, list[StepReport]]:
    """Each contender's timed steps, taken in turns of BLOCK."""
    reports: dict[str, list[StepReport]] = {name: [] for name in contenders}
    for step in range(warmup):
        for train_step in contenders.values():
            train_step(step)
    for start in range(0, steps, BLOCK):
        for name, train_step in contenders.items():
            reports[name] += [train_step(warmup + s) for s in range(start, min(start + BLOCK, steps))]
    return reports


def _summary(
    cfg: TrainConfig, world: World, replica: Replica, reports: dict[str, list[StepReport]], *, warmup: int
) -> dict[str, Any]:
    """Figures over all ranks: a step lasts as long as on its slowest rank."""
    columns = ("step_s", "data_wait_s", "exposed_comm_s")
    mine = {name: [[getattr(r, c) for c in columns] for r in rows] for name, rows in reports.items()}
    by_rank = gather_objects(mine, "bench.reports")
    times = {name: np.array([rank[name] for rank in by_rank]) for name in reports}  # (ranks, steps, columns)
    images = cfg.global_batch(world.size)

    def figures(name: str) -> dict[str, Any]:
        step_ms = 1e3 * times[name][:, :, 0].max(axis=0)
        low, p25, median, p75 = np.percentile(step_ms, [0, 25, 50, 75])
        return {
            "step_ms": {"min": low, "p25": p25, "median": median, "p75": p75},
            "images_per_s": 1e3 * images / median,
        }

    totals, last = times["ours"].sum(axis=(0, 1)), reports["ours"][-1]
    report = {
        "strategy": replica.strategy.name,
        "precision": cfg.precision,
        "ranks": world.size,
        "batch_per_rank": cfg.rank_batch(),
        "steps": len(reports["ours"]),
        **figures("ours"),
        "data_wait_share": totals[1] / totals[0],
        "exposed_comm_share": totals[2] / totals[0],
        "bytes_sent_per_step": sum(last.bytes_sent.values()),
        "bytes_sent": last.bytes_sent,
        "bytes_received": last.bytes_received,
        "method": {
            "warmup_steps": warmup,
            "block_steps": BLOCK,
            "step_time": "of the slowest rank, with decoding in the background",
            "model": cfg.model,
            "image_size": cfg.image_size,
            "pipeline": cfg.pipeline,
            "device": str(world.device),
            "threads_per_rank": torch.get_num_threads(),
            "machine": platform.machine(),
            "versions": runtime.versions(),
        },
    }
    for name in reports.keys() - {"ours"}:
        theirs = figures(name)
        ratio = theirs["step_ms"]["p25"] / report["step_ms"]["p25"]
        report["against"] = {"name": name, **theirs, "speedup_at_p25": ratio}
    return report


@contextmanager
def _data_or_synthetic(data: Path | None) -> Iterator[Path]:
    """The user's data set, or for the time of the measurement a synthetic one, each rank its own."""
    if data is not None:
        yield data
        return
    with tempfile.TemporaryDirectory(prefix="owt-bench-") as folder:
        root = Path(folder) / "synthetic"
        write_synthetic(root, **SYNTHETIC, workers=1)
        yield root


def format_step_report(report: dict[str, Any]) -> str:
    """The same figures for a person."""
    method, step_ms = report["method"], report["step_ms"]
    lines = [
        f"{method['model']}, {report['strategy']}, {report['precision']}, {report['ranks']} ranks x "
        f"{report['batch_per_rank']} images of {method['image_size']} px, {method['device']}, "
        f"{method['threads_per_rank']} threads a rank",
        f"step ms       min {step_ms['min']:.1f}   p25 {step_ms['p25']:.1f}   "
        f"median {step_ms['median']:.1f}   p75 {step_ms['p75']:.1f}",
        f"images/s      {report['images_per_s']:.1f}",
        f"data wait     {report['data_wait_share']:.2%} of the step",
        f"exposed comm  {report['exposed_comm_share']:.2%} of the step",
        f"bytes sent    {report['bytes_sent_per_step']:,} a rank and step",
    ]
    if theirs := report.get("against"):
        lines.append(
            f"{theirs['name']} loop    p25 {theirs['step_ms']['p25']:.1f} ms, {theirs['images_per_s']:.1f} "
            f"images/s: ours is {theirs['speedup_at_p25']:.2f} times as fast at the lower quartiles"
        )
    lines.append(
        f"method        {method['warmup_steps']} warm-up steps, {report['steps']} timed in blocks of "
        f"{method['block_steps']}; " + ", ".join(f"{k} {v}" for k, v in method["versions"].items())
    )
    return "\n".join(lines)
