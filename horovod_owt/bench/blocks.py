"""Shared by the benchmarks: alternating short blocks, figures over all ranks, and the method."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch

from horovod_owt.config import TrainConfig
from horovod_owt.parallel import runtime
from horovod_owt.parallel.collectives import gather_objects
from horovod_owt.parallel.runtime import World
from horovod_owt.train.replica import StepReport

BLOCK = 5  # steps of a contender's turn; few, so that all contenders see the same noise
SECONDS = ("step_s", "data_wait_s", "exposed_comm_s")  # fields of a StepReport: columns of `seconds_by_rank`

Name = TypeVar("Name", bound=Hashable)
log = logging.getLogger(__name__)


def alternate(
    contenders: Mapping[Name, Callable[[range], list[StepReport]]],
    world: World,
    *,
    steps: int,
    warmup: int,
    timed_block: Callable[[Name], AbstractContextManager] = lambda name: nullcontext(),
) -> dict[Name, list[StepReport]]:
    """Each contender's timed steps, in turns of BLOCK after `warmup` untimed ones.

    A contender runs a range of steps and returns their reports; none on a rank that takes no part in it.
    """
    reports: dict[Name, list[StepReport]] = {name: [] for name in contenders}
    for take_steps in contenders.values():
        take_steps(range(warmup))
    for start in range(0, steps, BLOCK):
        block = range(warmup + start, warmup + min(start + BLOCK, steps))
        for name, take_steps in contenders.items():
            with timed_block(name):
                reports[name] += take_steps(block)
                finish_queued_work(world.device)
        if world.is_root:
            latest = (f"{name} {1e3 * rows[-1].step_s:.0f}" for name, rows in reports.items())
            log.info("%d of %d steps | last step in ms: %s", block.stop - warmup, steps, ", ".join(latest))
    return reports


def finish_queued_work(device: torch.device) -> None:
    """Wait for the GPU, so that a step's last update does not run in the next contender's time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_by_rank(reports: dict[Name, list[StepReport]]) -> dict[Name, np.ndarray]:
    """By contender, an array (participating ranks, steps, len(SECONDS)); every rank must call it."""
    mine = {name: [[getattr(r, c) for c in SECONDS] for r in rows] for name, rows in reports.items()}
    by_rank = gather_objects(mine, "bench.reports")
    return {name: np.array([rank[name] for rank in by_rank if rank[name]]) for name in reports}


def figures(seconds: np.ndarray, images: int) -> dict[str, Any]:
    """Step times and images/s from a contender's `seconds_by_rank`; a step's time is its slowest rank's."""
    step_ms = 1e3 * seconds[:, :, 0].max(axis=0)
    low, p25, median, p75 = np.percentile(step_ms, [0, 25, 50, 75])
    return {
        "step_ms": {"min": low, "p25": p25, "median": median, "p75": p75},
        "images_per_s": 1e3 * images / median,
    }


def heading(report: dict[str, Any]) -> str:
    """First line of a report: what ran. Its keys are in the report or in its `method`."""
    about = report["method"] | report
    net = ", ".join(about[key] for key in ("model", "strategy", "precision") if key in about)
    return (
        f"{net}, {about['ranks']} ranks x {about['batch_per_rank']} images of {about['image_size']} px, "
        f"{about['device']}, {about['threads_per_rank']} threads per rank"
    )


def method(cfg: TrainConfig, world: World, *, warmup: int) -> dict[str, Any]:
    """The `method` entries common to all step benchmarks."""
    return {
        "warmup_steps": warmup,
        "block_steps": BLOCK,
        "model": cfg.model,
        "image_size": cfg.image_size,
        "device": str(world.device),
        "threads_per_rank": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": runtime.versions(),
    }
