"""Time training steps on real JPEGs and, on request, a plain loop in alternating blocks."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from horovod_owt.bench.blocks import alternate, figures, heading, method, seconds_by_rank
from horovod_owt.bench.contenders import random_batch, single_rank_world
from horovod_owt.bench.ddp_loop import DdpLoop
from horovod_owt.bench.images import given_or_synthetic
from horovod_owt.bench.plain_loop import PlainLoop
from horovod_owt.bench.request import refuse_uncompilable, refuse_unfit
from horovod_owt.config import TrainConfig
from horovod_owt.data.prefetch import FetchedEarly
from horovod_owt.parallel import runtime
from horovod_owt.parallel.choose import choose_parallel
from horovod_owt.parallel.runtime import World
from horovod_owt.perf.traffic import bytes_sent_per_step
from horovod_owt.train.pipelines import training_pipeline
from horovod_owt.train.prepare import prepare_request, with_cache
from horovod_owt.train.replica import Replica, StepReport

CLASSES = 1000  # when no data set is given
IN_TORCH = ("torch", "compile")  # contenders that run on each rank by itself


def bench_step(
    data: Path | None,
    recipe: str | None,
    settings: tuple[str, ...],
    *,
    steps: int,
    warmup: int,
    against: str | None,
) -> dict[str, Any] | None:
    """Time `steps` steps of each contender after `warmup` untimed ones; returns the report on rank 0."""
    if against == "compile":
        refuse_uncompilable(warmup)
    with given_or_synthetic(data) as root, ExitStack() as keep:
        if data is None:
            settings = (f"classes={CLASSES}", *settings)
        request = keep.enter_context(with_cache(prepare_request(root, recipe, settings)))
        cfg = dataclasses.replace(request.cfg, image_sizes=())  # of the last size
        if against in IN_TORCH:
            refuse_unfit(cfg, against)
        world = runtime.init(request.device, stall_limit_s=cfg.stall_limit_s, fc_group_size=cfg.fc_group_size)
        runtime.check_devices(request.device, world)
        cfg, _ = choose_parallel(cfg, world)
        with training_pipeline(cfg, request.folder, world) as batches:
            replica = Replica(cfg, world)
            early = FetchedEarly(batches, early=world.device.type == "cuda")  # as in training

            def ours(step: int) -> StepReport:
                consumed = step * cfg.global_batch(world.size)
                at = dict(consumed=consumed, lr=1e-4)
                return replica.train_step(early.__next__, fetch_next=early.fetch, **at)

            train_steps = {"ours": ours}
            if against == "plain":
                train_steps["plain"] = PlainLoop(cfg, world).train_step
            if against in IN_TORCH:
                train_steps[against] = DdpLoop(
                    cfg,
                    single_rank_world(world),
                    random_batch(cfg, world),
                    tuned=True,
                    compiled=against == "compile",
                ).train_step
            contenders = {
                name: lambda steps, train_step=train_step: [train_step(step) for step in steps]
                for name, train_step in train_steps.items()
            }
            reports = alternate(contenders, world, steps=steps, warmup=warmup)
        report = _summary(cfg, world, replica, reports, warmup=warmup)
    runtime.shutdown()
    return report if world.is_root else None


def _summary(
    cfg: TrainConfig, world: World, replica: Replica, reports: dict[str, list[StepReport]], *, warmup: int
) -> dict[str, Any]:
    """Figures over all ranks: a step takes as long as on its slowest rank."""
    seconds, images = seconds_by_rank(reports), cfg.global_batch(world.size)
    totals, last = seconds["ours"].sum(axis=(0, 1)), reports["ours"][-1]
    report = {
        "strategy": replica.strategy.name,
        "precision": cfg.precision,
        "ranks": world.size,
        "batch_per_rank": cfg.rank_batch(),
        "steps": len(reports["ours"]),
        **figures(seconds["ours"], images),
        "data_wait_share": totals[1] / totals[0],
        "exposed_comm_share": totals[2] / totals[0],
        "bytes_sent_per_step": sum(last.bytes_sent.values()),
        "bytes_sent": last.bytes_sent,
        "bytes_sent_expected": bytes_sent_per_step(cfg, world.size),
        "bytes_received": last.bytes_received,
        "method": {
            **method(cfg, world, warmup=warmup),
            "step_time": "of the slowest rank, with decoding in the background",
            "pipeline": cfg.pipeline,
            "classes": cfg.classes,
        },
    }
    for name in reports.keys() - {"ours"}:
        theirs = figures(seconds[name], images)
        ratio = theirs["step_ms"]["p25"] / report["step_ms"]["p25"]
        report["against"] = {"name": name, **theirs, "speedup_at_p25": ratio}
    return report


def format_step_report(report: dict[str, Any]) -> str:
    """The report as text."""
    method, step_ms = report["method"], report["step_ms"]
    lines = [
        heading(report),
        f"step ms       min {step_ms['min']:.1f}   p25 {step_ms['p25']:.1f}   "
        f"median {step_ms['median']:.1f}   p75 {step_ms['p75']:.1f}",
        f"images/s      {report['images_per_s']:.1f}",
        f"data wait     {report['data_wait_share']:.2%} of the step",
        f"exposed comm  {report['exposed_comm_share']:.2%} of the step",
        f"bytes sent    {report['bytes_sent_per_step']:,} per rank and step "
        f"({sum(report['bytes_sent_expected'].values()):,.0f} by the closed form)",
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
