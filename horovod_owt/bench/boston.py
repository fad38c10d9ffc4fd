"""Repeat the measurement of Boston's report: AlexNet-OWT, 1000 classes, mini-batches of 128, real JPEGs.

See docs/boston-report.md. Learning rate and weight decay are the initial ones of the Torch7 programs.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

import numpy as np

from horovod_owt.bench.blocks import method
from horovod_owt.bench.images import given_or_synthetic
from horovod_owt.data.prefetch import FetchedEarly
from horovod_owt.data.store import SPLITS
from horovod_owt.errors import ConfigError
from horovod_owt.parallel import runtime
from horovod_owt.parallel.choose import choose_parallel
from horovod_owt.parallel.collectives import gather_objects
from horovod_owt.perf.claim import MINI_BATCH, predicted_images_per_s
from horovod_owt.perf.layers import net_of
from horovod_owt.perf.machine import load_machine
from horovod_owt.topology import rank_topology
from horovod_owt.train.pipelines import training_pipeline
from horovod_owt.train.prepare import prepare_request
from horovod_owt.train.replica import Replica, StepReport
from horovod_owt.train.stop import StopRequest

CLASSES = 1000
LR, WEIGHT_DECAY = 1e-2, 5e-4
MACHINE = "boston-k80"
WARMUP = 3  # untimed mini-batches
LAST = 10  # mini-batches whose mean loss is reported
LOG_EVERY = 20  # mini-batches

log = logging.getLogger(__name__)


def bench_boston(
    data: Path | None, recipe: str | None, settings: tuple[str, ...], *, batches: int
) -> dict[str, Any] | None:
    """Train for `batches` mini-batches after WARMUP; returns the report on rank 0.

    A signal stops it after the current mini-batch; the report covers the completed ones. Raises
    KeyboardInterrupt if there are none.
    """
    ranks = rank_topology().world_size
    if MINI_BATCH % ranks:
        raise ConfigError(
            f"{ranks} ranks for mini-batches of {MINI_BATCH}", wanted="a number that divides it"
        ).on_every_rank()
    if batches < 1:
        raise ConfigError(f"--batches {batches}", wanted="at least 1").on_every_rank()
    fixed = (
        f"batch={MINI_BATCH // ranks}",
        f"classes={CLASSES}",
        f"weight_decay={WEIGHT_DECAY}",
        f"parallel={'hybrid' if ranks > 1 else 'data'}",
        "fc_group_size=all",
    )
    with given_or_relabelled(data) as root:
        request = prepare_request(root, recipe, (*fixed, *settings))
        cfg = dataclasses.replace(request.cfg, image_sizes=())  # of the last size
        if cfg.global_batch(ranks) != MINI_BATCH:
            raise ConfigError(
                f"a global mini-batch of {cfg.global_batch(ranks)}", wanted=str(MINI_BATCH)
            ).on_every_rank()
        world = runtime.init(request.device, stall_limit_s=cfg.stall_limit_s, fc_group_size=cfg.fc_group_size)
        runtime.check_devices(request.device, world)
        cfg, _ = choose_parallel(cfg, world)
        with StopRequest() as stop, training_pipeline(cfg, request.folder, world) as images:
            replica = Replica(cfg, world)
            reports, wall_s = _train(replica, images, batches, stop)
        everyone = gather_objects([report.step_s for report in reports], "boston.seconds")
        seconds = np.max(everyone, axis=0)
        report = _report(replica, reports, seconds, wall_s, data)
    runtime.shutdown()
    return report if world.is_root else None


@contextmanager
def given_or_relabelled(data: Path | None) -> Iterator[Path]:
    """The user's data set, or a few synthetic JPEGs spread over CLASSES labels by symbolic links.

    The loss needs all labels and the decoder real JPEGs, but nothing is learned from them, and generating
    one image per class would take minutes.
    """
    with given_or_synthetic(data) as root:
        if data is not None:
            yield root
            return
        folder = root.with_name("relabelled")  # in the same temporary folder
        for split in SPLITS:
            drawn = itertools.cycle(sorted((root / split).rglob("*.JPEG")))
            for label, source in zip(range(CLASSES), drawn, strict=False):
                synset = folder / split / f"n{label:08d}"
                synset.mkdir(parents=True)
                (synset / source.name).symlink_to(source)
        yield folder


def _train(replica: Replica, images, batches: int, stop: StopRequest) -> tuple[list[StepReport], float]:
    """Reports of the timed mini-batches, and their wall time in seconds."""
    reports: list[StepReport] = []
    early = FetchedEarly(images, early=replica.world.device.type == "cuda")  # as in training
    start = perf_counter()
    for number in range(WARMUP + batches):
        if number == WARMUP:
            start = perf_counter()
        at = dict(consumed=number * MINI_BATCH, lr=LR, stop=stop.asked)
        report = replica.train_step(early.__next__, fetch_next=early.fetch, **at)
        if number >= WARMUP:
            reports.append(report)
        if replica.world.is_root and len(reports) % LOG_EVERY == 1:
            # as fbcunn's program prints it
            log.info("[%d/%d]  Time %.3f  Err %.4f", len(reports), batches, report.step_s, report.loss)
        if report.stop_asked:  # on any rank
            break
    if not reports:
        raise KeyboardInterrupt
    return reports, perf_counter() - start


def _report(
    replica: Replica, reports: list[StepReport], seconds: np.ndarray, wall_s: float, data: Path | None
) -> dict[str, Any]:
    cfg, world, machine = replica.cfg, replica.world, load_machine(MACHINE)
    low, p25, median, p75 = np.percentile(seconds, [0, 25, 50, 75])
    planned_s = MINI_BATCH / predicted_images_per_s(
        machine, net_of(cfg.model, classes=CLASSES), global_batch=MINI_BATCH
    )
    return {
        "ranks": world.size,
        "strategy": replica.strategy.name,
        "global_batch": MINI_BATCH,
        "batches": len(reports),
        "s_per_batch": {"min": low, "p25": p25, "median": median, "p75": p75},
        "minutes_for_1000": 1000 * wall_s / len(reports) / 60,
        "images_per_s": MINI_BATCH * len(reports) / wall_s,
        "data_wait_share": sum(r.data_wait_s for r in reports) / sum(r.step_s for r in reports),
        "first_loss": reports[0].loss,
        "loss": fmean(report.loss for report in reports[-LAST:]),
        "log_classes": math.log(CLASSES),
        "reported": {
            "s_per_batch": machine.report["s_per_epoch"],
            "minutes_for_1000": machine.report["minutes"],
            "error": machine.report["error"],
        },
        "planned": {
            "machine": machine.name,
            "s_per_batch": planned_s,
            "minutes_for_1000": 1000 * planned_s / 60,
        },
        "method": {
            **method(cfg, world, warmup=WARMUP),
            "pipeline": cfg.pipeline,
            "images": "the user's" if data else "200 synthetic JPEGs, spread over the classes",
            "lr": LR,
            "weight_decay": cfg.weight_decay,
            "s_per_batch": "of the slowest rank, including the wait for images",
            "minutes_for_1000": "wall time of all timed mini-batches, scaled to 1000",
            "loss": f"mean of the last {min(LAST, len(reports))} mini-batches",
        },
    }


def format_boston_report(report: dict[str, Any]) -> str:
    """The report as text."""
    said, planned, seconds = report["reported"], report["planned"], report["s_per_batch"]
    rows = [
        ("", "here", "the report", "planned for four GK210"),
        (
            "seconds a mini-batch",
            f"{seconds['median']:.3f}",
            f"{said['s_per_batch']:g}",
            f"{planned['s_per_batch']:.3f}",
        ),
        (
            "minutes for 1000",
            f"{report['minutes_for_1000']:.1f}",
            f"{said['minutes_for_1000']:g}",
            f"{planned['minutes_for_1000']:.2f}",
        ),
        (
            "loss (the report's error)",
            f"{report['loss']:.4f}",
            f"{said['error']:g}",
            f"{report['log_classes']:.4f} untrained",
        ),
    ]
    method = report["method"]
    return "\n".join(
        [
            f"{method['model']}, {report['strategy']}, {report['ranks']} ranks, mini-batches of "
            f"{report['global_batch']}, {method['device']}, {method['threads_per_rank']} threads per rank, "
            f"images by {method['pipeline']}",
            "",
            *(f"{a:26}{b:>10}{c:>14}{d:>26}" for a, b, c, d in rows),
            "",
            f"{report['batches']} mini-batches after {method['warmup_steps']}; seconds: min "
            f"{seconds['min']:.3f}, p25 {seconds['p25']:.3f}, p75 {seconds['p75']:.3f}, of the slowest rank; "
            f"{report['data_wait_share']:.1%} of the time waiting for images",
            ", ".join(f"{name} {version}" for name, version in method["versions"].items()),
        ]
    )
