"""The training loop of one rank."""

from __future__ import annotations

import logging
import math
import os
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil

from horovod_owt.config import TrainConfig
from horovod_owt.data.order import SampleOrder
from horovod_owt.data.prefetch import FetchedEarly
from horovod_owt.errors import OwtError, Preempted, RunError, as_owt_error
from horovod_owt.parallel import runtime
from horovod_owt.parallel.activity import now
from horovod_owt.parallel.choose import choose_parallel
from horovod_owt.parallel.collectives import broadcast_object, explain_lost_ranks, gather_objects, on_root
from horovod_owt.parallel.elastic import RESETS, ElasticState, regroup, regroup_reason
from horovod_owt.parallel.heartbeat import Heartbeat
from horovod_owt.parallel.runtime import World
from horovod_owt.parallel.timeline import start_timeline, stop_timeline
from horovod_owt.runs.attempts import job_name
from horovod_owt.runs.control import STOP
from horovod_owt.runs.folder import timeline_file, write_config
from horovod_owt.runs.opening import Opened, Resume
from horovod_owt.runs.owner import Ownership
from horovod_owt.runs.timeline import complete_timelines
from horovod_owt.schedule import learning_rate, new_row, weight_decay
from horovod_owt.train.agreement import check_agreement
from horovod_owt.train.bad_images import BadImageLog
from horovod_owt.train.checkpoint_writer import CheckpointWriter
from horovod_owt.train.evaluate import validate
from horovod_owt.train.journal import Journal, open_run
from horovod_owt.train.observers import Observers
from horovod_owt.train.pipelines import training_pipeline, validation_pipeline
from horovod_owt.train.prepare import Request
from horovod_owt.train.profile import Profile
from horovod_owt.train.rank_log import RankLog
from horovod_owt.train.replica import BadBatch, Replica
from horovod_owt.train.slow_steps import placement
from horovod_owt.train.start_record import log_start, start_record
from horovod_owt.train.state import Position, allocate_snapshot, commit, restore, restore_commit, snapshot
from horovod_owt.train.step_records import StepRecords
from horovod_owt.train.stop import StopRequest
from horovod_owt.train.watch import watched

log = logging.getLogger(__name__)

SHOWN_INDICES = 4096  # image indices in the message about a NaN loss: a global batch may have a million


def train_rank(request: Request, *, run_dir: Path | None = None, resume: Resume) -> None:
    """Run one rank of training to its end.

    Raises OwtError for failures that a message explains, among them Preempted (exit code 75) after a stop
    request.
    """
    world = runtime.init(
        request.device,
        stall_limit_s=request.cfg.stall_limit_s,
        fc_group_size=request.cfg.fc_group_size,
        timeline=request.cfg.timeline,
    )
    with explain_lost_ranks(), StopRequest() as stop, Ownership() as ownership:
        check_agreement(request.cfg, request.folder.fingerprint(), request.device, world)
        cfg = broadcast_object(request.cfg, "config", kind=TrainConfig)
        data = request.folder.identity()
        opened = on_root(lambda: open_run(run_dir, cfg, data, resume, ownership), "run_dir", kind=Opened)
        Run(cfg, request, world, opened, stop).train()
    runtime.shutdown()


class Run:
    """A run in progress: the replica, its position in the stream of samples, and its records."""

    def __init__(
        self,
        cfg: TrainConfig,
        request: Request,
        world: World,
        opened: Opened,
        stop: StopRequest,
        elastic_state: ElasticState | None = None,
    ) -> None:
        """`elastic_state` is given in an elastic job; its commit has precedence over checkpoints."""
        self.cfg, self.world, self.run_dir = cfg, world, opened.run_dir
        self.data, self.folder = request.data, request.folder
        self.global_batch = cfg.global_batch(world.size)
        self.position = Position(num_samples=len(self.folder.train))
        self._opened, self._elastic_state = opened, elastic_state
        self.start, self._began = opened.start, time.time()
        self.journal = Journal(self.run_dir, self.start, cfg, stop) if world.is_root else None
        self._stop, self._stopped_by = stop, ""
        self.writer: CheckpointWriter | None = None  # on rank 0, once the state is complete
        self.observers = Observers()
        self.bad_training_images = BadImageLog(self.folder.train, world, self._record)
        self.bad_validation_images = BadImageLog(self.folder.val, world, self._record)

    def train(self) -> None:
        """Train to the end. The outcome is recorded in the run folder, unless training could not begin."""
        reason, exit_code, now.step = "done", 0, 0
        bug: BaseException | None = None
        rank_log = RankLog(self.run_dir, self.start, self.world)
        elastic = self._elastic_state is not None
        explain_losses = nullcontext if elastic else explain_lost_ranks
        watch = watched(
            self.world,
            self.run_dir,
            start=self.start,
            stall_limit_s=self.cfg.stall_limit_s,
            record=self._record,
            elastic=elastic,
        )
        try:
            requests = self.journal.requests if self.journal else nullcontext()
            with (
                requests,
                explain_losses(),  # while the heartbeat starts
                watch as heartbeat,
                explain_losses(heartbeat.lost),
            ):
                self._begin(heartbeat)
                placements = gather_objects(placement(self.world), "placements")
                if self.world.is_root:
                    self._record_start([host for host, *_ in placements])
                if self._due.checkpoint:
                    self._checkpoint(validation_due=self._due.validation)
                if self._due.validation:
                    self._validate()
                with self._step_records(placements) as records:
                    self._run_steps(records)
        except RESETS as error:
            exit_code = None
            self._elastic_state.regrouped = {
                "fault": f"ranks regroup: {regroup_reason(error)}",
                "step": self.position.step,
                "world_size": self.world.size,
            }
            reason = self._elastic_state.regrouped["fault"]
            raise
        except BaseException as error:
            known = as_owt_error(error)
            reason = str(known) if known else f"a bug: {type(error).__name__}, see the traceback in the log"
            exit_code = known.exit_code if known else 1
            bug = None if known else error
            raise
        finally:
            went_well = exit_code in (None, 0, Preempted.exit_code)
            rank_log.note(logging.INFO if went_well else logging.ERROR, reason, error=bug)
            rank_log.close()
            self._close(exit_code, reason)

    def _begin(self, heartbeat: Heartbeat) -> None:
        """Build the replica and restore its state, with the first collectives on the devices."""
        cfg, self.predicted_step_ms = choose_parallel(self.cfg, self.world)
        if cfg != self.cfg:
            self.cfg = cfg
            on_root(lambda: write_config(self.run_dir, cfg.to_dict()), "chosen strategy")
        self.replica = Replica(cfg, self.world)
        if self._elastic_state is not None and self._elastic_state.last:
            self._due = restore_commit(self.replica, self.position, self._elastic_state)
        else:
            self._due = restore(self.replica, self.position, self.run_dir, self._opened.checkpoint)
        now.step = self.position.step
        self._copies = allocate_snapshot(self.replica)
        self.total_steps = cfg.total_steps(
            self.position.num_samples,
            self.world.size,
            step=self.position.step,
            consumed=self.position.consumed,
        )
        on_root(lambda: self._open_observers(heartbeat), "observers")
        self.writer = self._make_writer() if self.world.is_root else None

    def _open_observers(self, heartbeat: Heartbeat) -> None:
        """Start the timeline, TensorBoard and metrics, on rank 0."""
        if self.cfg.timeline:
            complete_timelines(self.run_dir)  # left by an attempt that was killed
            start_timeline(timeline_file(self.run_dir, self.position.step))
        epoch = math.ceil(self.position.num_samples / self.global_batch)
        self.observers.open(
            self.cfg,
            self.run_dir,
            self.start,
            step=self.position.step,
            total_steps=self.total_steps,
            checkpoint_steps=min(self.cfg.checkpoint_every or epoch, epoch),
            heartbeat=heartbeat,
            resumes=self.position.step > 0,
        )

    def _step_records(self, placements: list[list]) -> AbstractContextManager[StepRecords | None]:
        """The records of steps, on rank 0; None on other ranks."""
        if not self.world.is_root:
            return nullcontext()
        return StepRecords(
            self.cfg,
            self.world,
            placements,
            self.observers,
            self._record,
            total_steps=self.total_steps,
            first_step=self.position.step,
        )

    def _run_steps(self, records: StepRecords | None) -> None:
        cfg, position, bad_images = self.cfg, self.position, self.bad_training_images
        batches = training_pipeline(
            cfg, self.folder, self.world, position=position.consumed, bad_images=bad_images.known
        )
        with batches, Profile(cfg.profile, self.world, self.run_dir) as profile:
            # On CPU ranks, fetching within a step would take cores from compute.
            early = FetchedEarly(batches, early=self.world.device.type == "cuda")
            collected = bad_images.collect(early)
            next_batch = self.observers.show_first(collected, position.step + 1).__next__
            every = cfg.grad_norm_every
            while position.step < self.total_steps:
                began, lr = position.epoch, self._learning_rate()
                try:
                    report = self.replica.train_step(
                        next_batch,
                        consumed=position.consumed,
                        lr=lr,
                        weight_decay=weight_decay(cfg.schedule, epoch=began, otherwise=cfg.weight_decay),
                        stop=self._stop.asked,
                        save=self.journal is not None and self.journal.requests.save_asked,
                        announced=bad_images.known.named,
                        measure_norm=bool(every) and (position.step + 1) % every == 0,
                        compress=position.step >= cfg.compression_start,
                        fetch_next=early.fetch,
                    )
                except FloatingPointError as error:
                    raise self._not_finite(error, lr) from None
                except BadBatch:
                    raise bad_images.fatal_error(
                        position.step + 1, none_is_good=cfg.bad_images == "skip"
                    ) from None
                position.step = now.step = position.step + 1
                if self.writer is not None:
                    self.writer.poll()
                position.consumed += self.global_batch
                if cfg.momentum_reset and new_row(cfg.schedule, began, position.epoch):
                    self.replica.reset_momentum()  # before a checkpoint, since a resumed run would not do it
                if records is not None:
                    records.step(position, lr, report)
                if report.any_unannounced:
                    bad_images.announce(position.step)
                profile.step()

                epoch_over = int(position.epoch) > int(began)
                last = position.step == self.total_steps
                due = cfg.checkpoint_every and position.step % cfg.checkpoint_every == 0
                validate = epoch_over or last
                save = validate or due or report.stop_asked or report.save_asked
                if save:
                    if records is not None:
                        records.checkpoint(position.step)
                    self.replica.average_running_statistics()
                hosts_changed = self._commit(checkpoint_due=save, validation_due=validate)
                if save:
                    self._checkpoint(validation_due=validate)
                if report.stop_asked:
                    raise self._stopped()
                if validate:
                    self._validate()
                if hosts_changed:
                    regroup()
            self._finish_writing()
        if self.world.is_root and self._bad_images:
            log.info("%d bad images skipped; see the `fault` records", self._bad_images)

    def _learning_rate(self) -> float:
        cfg = self.cfg
        return learning_rate(
            cfg.schedule,
            peak_lr=cfg.peak_lr(self.world.size),
            epoch=self.position.epoch,
            epochs=cfg.epochs,
            warmup_epochs=cfg.warmup_epochs,
            step_epochs=self.global_batch / self.position.num_samples,
        )

    def _not_finite(self, error: FloatingPointError, lr: float) -> OwtError:
        """The error for a NaN or infinite loss, with the images of the step."""
        position = self.position
        self._record("fault", fault=str(error), step=position.step + 1, loss_not_finite=True)
        shown = min(self.global_batch, SHOWN_INDICES)
        _, indices = SampleOrder(position.num_samples, self.cfg.seed).at(position.consumed, shown)
        more = f" and {self.global_batch - shown} more" if self.global_batch > shown else ""
        return RunError(
            f"{error} at step {position.step + 1}, lr {lr:.2e}, image indices {indices.tolist()}{more}",
            wanted="a finite loss",
            fix="a smaller lr or more warmup_epochs; the last checkpoint is finite",
        ).on_every_rank()

    def _validate(self) -> None:
        """Validate the model. A stop request ends it: the checkpoint is written, a resumed run validates."""
        position, bad_images, start = self.position, self.bad_validation_images, perf_counter()
        images = self.folder.val
        with validation_pipeline(self.cfg, images, self.world, bad_images=bad_images.known) as batches:
            with now.phase("validating"):
                score = validate(
                    self.replica, bad_images.collect(batches), stop_asked=lambda: self._stop.asked
                )
        if score is None:
            raise self._stopped()
        if score.bad_images:
            if self.cfg.bad_images == "fail":
                raise bad_images.fatal_error(position.step)
            bad_images.announce(position.step)
        took_s = perf_counter() - start
        self._record(
            "validation", epoch=position.epoch, step=position.step, **score.to_dict(), validation_s=took_s
        )
        if self.world.is_root:
            log.info("validation | epoch %.2f | %s", position.epoch, score)
            self.observers.per_class(position.step, score.class_top1(), self.folder.classes)
            self.writer.score(step=position.step, epoch=position.epoch, top1=score.top1)

    def _commit(self, *, checkpoint_due: bool, validation_due: bool) -> bool:
        """Commit, in an elastic job, if one is due; returns, on every rank, whether hosts joined or left."""
        if self._elastic_state is None or not (
            checkpoint_due or self.position.step % self.cfg.commit_every == 0
        ):
            return False
        due = {"checkpoint_due": checkpoint_due, "validation_due": validation_due}
        return commit(self.replica, self.position, self._elastic_state, self._opened, **due)

    def _checkpoint(self, *, validation_due: bool) -> None:
        """Copy the state, to be written while training continues."""
        start = perf_counter()
        on_root(self.writer.settle if self.writer else None, "checkpoint")
        state = snapshot(
            self.replica,
            self.position,
            self._copies,
            validation_due=validation_due,
            began_from=self._opened.began_from,
            job=job_name(os.environ),
            data=self.folder.identity(),
            **self._kept_global_batch(),
        )
        if self.writer is not None:
            self.journal.requests.saving(self.position.step)
            self.writer.write(state, stall_s=perf_counter() - start)

    def _kept_global_batch(self) -> dict[str, int]:
        """The global batch to store with a checkpoint: a job may resume with fewer ranks."""
        if self._elastic_state is None or self.cfg.elastic_batch != "keep":
            return {}
        return {"kept_global_batch": self._elastic_state.last.first_global_batch}

    def _finish_writing(self) -> None:
        on_root(self.writer.finish if self.writer else None, "written")

    def _stopped(self) -> Preempted:
        """The error to raise on every rank after a stop request, once the checkpoint is on disk."""
        self._finish_writing()
        asked = gather_objects((self._stop.by, self.world.host), "signals")
        named = [f"{by} to rank {rank} on {host}" for rank, (by, host) in enumerate(asked) if by]
        more = f" and {len(named) - 1} more" if named[1:] else ""
        by_file = STOP in (by for by, _ in asked)
        self._stopped_by = STOP if by_file else next(by for by, _ in asked if by)
        what = f"the file {STOP}" if by_file else named[0] + more
        return Preempted(
            f"stopped by {what} after step {self.position.step}, checkpoint written",
            fix=f"the same command with --run-dir {self.run_dir} resumes",
        )

    def _make_writer(self) -> CheckpointWriter:
        cfg = self.cfg
        return CheckpointWriter(
            self.run_dir, keep=cfg.keep_checkpoints, retries=cfg.checkpoint_retries, record=self._record
        )

    def _record_start(self, hosts: list[str]) -> None:
        if self._elastic_state is not None and self._elastic_state.regrouped:
            self._record("fault", **self._elastic_state.regrouped)
        record = start_record(
            self.cfg,
            self.world,
            hosts,
            self.data,
            self.folder,
            started=self._started(),
            first_step=self.position.step,
            predicted_step_ms=self.predicted_step_ms,
        )
        self._record("run", **record)
        log_start(record, self.world, self.folder, self.run_dir, total_steps=self.total_steps)

    def _started(self) -> float:
        """When this process was started; in later worlds of an elastic job, when the world began."""
        regrouped = self._elastic_state is not None and self._elastic_state.regrouped
        return self._began if regrouped else psutil.Process().create_time()

    @property
    def _bad_images(self) -> int:
        """Number of bad files that any rank has read so far."""
        return sum(len(each.known.named) for each in (self.bad_training_images, self.bad_validation_images))

    def _record(self, kind: str, **values) -> None:
        if self.journal is not None:
            self.journal.record(kind, **values)
            self.observers.record(kind, values)

    def _close(self, exit_code: int | None, reason: str) -> None:
        """Write the outcome, unless an elastic job continues (exit code None), and close the files."""
        if self.journal is not None:
            if self.writer is not None:
                self.writer.close()
            if self.cfg.timeline:
                stop_timeline()
                complete_timelines(self.run_dir)
            if exit_code is not None and self.writer is not None:
                self.journal.end(self._outcome(exit_code, reason))
            self.observers.close()
            self.journal.close()
        if self.cfg.hook and exit_code in (0, Preempted.exit_code):
            # Wait for rank 0's hook: once a rank has exited, the launcher soon ends rank 0 and the hook.
            with suppress(*RESETS):
                on_root(lambda: None, "hook")

    def _outcome(self, exit_code: int, reason: str) -> dict[str, Any]:
        return {
            "exit_code": exit_code,
            "reason": reason,
            "step": self.position.step,
            "epoch": self.position.epoch,
            "bad_images": self._bad_images,
            **({"stopped_by": self._stopped_by} if self._stopped_by else {}),
        }
