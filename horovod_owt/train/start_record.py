"""The `run` record and the log lines at the start of a run, or after its ranks have regrouped."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from horovod_owt.config import TrainConfig
from horovod_owt.data.listing import left_out_text
from horovod_owt.data.store import DataSet
from horovod_owt.logs import utc
from horovod_owt.parallel import runtime
from horovod_owt.parallel.runtime import World
from horovod_owt.perf.traffic import bytes_sent_per_step

log = logging.getLogger(__name__)


def start_record(
    cfg: TrainConfig,
    world: World,
    hosts: Sequence[str],
    data: Path,
    folder: DataSet,
    *,
    started: float,
    first_step: int,
    predicted_step_ms: Mapping[str, float],
) -> dict[str, Any]:
    """The `run` record; `hosts` is by rank, `started` a Unix time."""
    return {
        "started": utc(started),
        "config": cfg.to_dict(),
        "versions": runtime.versions(),
        "hosts": list(hosts),
        "data": str(data),
        "world_size": world.size,
        "global_batch": cfg.global_batch(world.size),
        "peak_lr": cfg.peak_lr(world.size),
        "first_step": first_step,
        "bytes_sent_per_step_expected": bytes_sent_per_step(cfg, world.size),
        **({"predicted_step_ms": predicted_step_ms} if predicted_step_ms else {}),
        "train_images": len(folder.train),
        "val_images": len(folder.val),
        "left_out": sum(each.images for each in folder.left_out),
    }


def log_start(
    record: Mapping[str, Any], world: World, folder: DataSet, run_dir: Path, *, total_steps: int
) -> None:
    """Log the main values of the `run` record."""
    cfg = record["config"]
    ranks = f"{world.size} rank{'s'[: world.size > 1]} on {', '.join(dict.fromkeys(record['hosts']))}"
    log.info(
        "%s, %d classes, %s | %s, %s", cfg["model"], cfg["classes"], cfg["precision"], ranks, world.device
    )
    log.info(
        "%d training and %d validation images | global batch %d | peak lr %.2e",
        record["train_images"], record["val_images"], record["global_batch"], record["peak_lr"],
    )  # fmt: skip
    if folder.left_out:
        log.warning("%s; `owt data verify` names them", left_out_text(folder.left_out))
    log.info("run folder %s", run_dir)
    if record["first_step"] >= total_steps:
        log.info("nothing left to do: all %d steps are done", record["first_step"])
