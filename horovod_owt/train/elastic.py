"""Elastic training: each set of ranks (a world) is a `Run`, started from the last commit."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from pathlib import Path

import torch

from horovod_owt.config import TrainConfig
from horovod_owt.errors import ConfigError, OwtError
from horovod_owt.parallel import elastic, runtime
from horovod_owt.parallel.collectives import broadcast_object, on_root
from horovod_owt.parallel.elastic import ElasticState
from horovod_owt.runs.attempts import scheduler_job_id
from horovod_owt.runs.opening import Opened, Resume
from horovod_owt.runs.owner import Ownership
from horovod_owt.train.agreement import check_agreement
from horovod_owt.train.journal import open_run
from horovod_owt.train.loop import Run
from horovod_owt.train.prepare import Request
from horovod_owt.train.stop import StopRequest

log = logging.getLogger(__name__)


def train_elastic(request: Request, *, run_dir: Path | None, resume: Resume) -> None:
    """Run one rank of an elastic job to its end.

    Raises ConfigError for a hybrid run, where a lost rank's part of the FC layers is lost with it.
    """
    if request.cfg.parallel != "data":
        raise ConfigError(
            f"parallel={request.cfg.parallel} in an elastic job: a lost rank's FC layers are lost with it",
            wanted="parallel=data",
            fix="--parallel data, or `owt launch supervise`, which restarts from the last checkpoint",
        ).on_every_rank()
    runtime.init(request.device, stall_limit_s=request.cfg.stall_limit_s, timeline=request.cfg.timeline)
    opened: Opened | None = None
    with StopRequest() as stop, Ownership() as ownership:

        def train(state: ElasticState) -> None:
            nonlocal opened
            world = runtime.current_world(request.device)
            if not world.is_root:
                ownership.hand_over()  # before the next collective, after which the new rank 0 takes it
            try:
                check_agreement(request.cfg, request.folder.fingerprint(), request.device, world)
            except OwtError as error:
                if opened is None:  # at the start of the job, or this rank has just joined
                    raise
                why = f"ranks that joined are refused: {error}"
                if world.is_root:
                    log.warning("%s", why)
                elastic.regroup_without_newcomers(state, why, world.size)
            cfg = broadcast_object(request.cfg, "config", kind=TrainConfig)
            where = opened.run_dir if opened else run_dir
            opened = on_root(lambda: _open(where, cfg, state), "run_dir", kind=Opened)
            kept = state.last.first_global_batch if state.last else opened.kept_global_batch
            if kept:
                cfg = config_for_world(world.size, cfg, kept)
            else:  # remembered even if ranks are lost before the first commit
                opened = dataclasses.replace(opened, kept_global_batch=cfg.global_batch(world.size))
            Run(cfg, request, world, opened, stop, elastic_state=state).train()

        def _open(where: Path | None, cfg: TrainConfig, state: ElasticState) -> Opened:
            if not state.last:
                found = open_run(where, cfg, request.folder.identity(), resume, ownership)
                if opened is None:
                    return found
                kept = found.kept_global_batch or opened.kept_global_batch
                return dataclasses.replace(found, attempt=opened.attempt, kept_global_batch=kept)
            ownership.take(state.last.run_dir)
            return Opened(
                state.last.run_dir,
                began_from=state.last.began_from,
                attempt=state.last.attempt,
                job_id=scheduler_job_id(os.environ),
            )

        elastic.run(ElasticState(torch.device(request.device.name)), train)
    runtime.shutdown()


def config_for_world(ranks: int, cfg: TrainConfig, first_global_batch: int) -> TrainConfig:
    """The configuration for `ranks`; `first_global_batch` is that of the run's first elastic world.

    With elastic_batch=scale it is unchanged: the global batch, and with it the learning rate, scales with the
    number of ranks. With keep, each rank takes its share of the first global batch, in micro-batches of at
    most `batch` images; the share is rounded, with a warning, and with batch normalisation it is at least two
    images.
    """
    if cfg.elastic_batch == "scale":
        return cfg
    least = min(cfg.batch, 2) if cfg.model == "alexnet-owt-bn" else 1
    share = max(least, round(first_global_batch / ranks))
    accum_steps = math.ceil(share / cfg.batch)
    kept = dataclasses.replace(cfg, batch=max(1, round(share / accum_steps)), accum_steps=accum_steps)
    if kept.global_batch(ranks) != first_global_batch:
        log.warning(
            "global batch %d instead of %d, which %d ranks cannot share evenly",
            kept.global_batch(ranks), first_global_batch, ranks,
        )  # fmt: skip
    return kept
