"""Rank 0's handling of each step's report: progress, records, and detection of slow steps and ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from horovod_owt.config import TrainConfig
from horovod_owt.parallel.runtime import World
from horovod_owt.train.observers import Observers
from horovod_owt.train.progress import Progress
from horovod_owt.train.rank_times import MeanRankTimes
from horovod_owt.train.replica import StepReport
from horovod_owt.train.slow_steps import SlowSteps
from horovod_owt.train.state import Position
from horovod_owt.train.stragglers import Stragglers


class StepRecords:
    """The reports of one world of ranks; a context in which progress is shown."""

    def __init__(
        self,
        cfg: TrainConfig,
        world: World,
        placements: Sequence[list],
        observers: Observers,
        record: Callable[..., Any],
        *,
        total_steps: int,
        first_step: int,
    ) -> None:
        """`placements`: `slow_steps.placement` of all ranks; `record` writes a line to the metrics."""
        self._global_batch = cfg.global_batch(world.size)
        self._observers, self._record = observers, record
        self._rank_times = MeanRankTimes(record)
        self._slow_steps = SlowSteps(cfg, world, placements)
        self._stragglers = Stragglers([host for host, *_ in placements], record)
        self._progress = Progress(
            total_steps=total_steps,
            first_step=first_step,
            global_batch=self._global_batch,
            every=cfg.log_every,
        )

    def __enter__(self) -> StepRecords:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)

    def step(self, position: Position, lr: float, report: StepReport) -> None:
        """Process the report of the step that led to `position`."""
        self._progress.step(position.step, position.epoch, lr, report)
        self._slow_steps.step(report)
        self._stragglers.step(position.step, report.ranks)
        self._record(
            "step",
            step=position.step,
            epoch=position.epoch,
            loss=report.loss,
            lr=lr,
            images_per_s=self._global_batch / report.step_s,
            step_ms=1e3 * report.step_s,
            data_wait_ms=1e3 * report.data_wait_s,
            exposed_comm_ms=1e3 * report.exposed_comm_s,
            bytes_sent=report.bytes_sent,
            bytes_received=report.bytes_received,
            bad_images=report.bad_images,
            **({} if report.grad_norm is None else {"grad_norm": report.grad_norm}),
        )
        self._observers.ranks(report.ranks)
        self._rank_times.add(report.ranks)

    def checkpoint(self, step: int) -> None:
        """Record the ranks' mean times since the last checkpoint."""
        self._rank_times.write(step)
