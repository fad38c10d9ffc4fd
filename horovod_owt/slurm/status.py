"""The status of a job: its state from Slurm, its progress from the run folder."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from horovod_owt.errors import ConfigError, Preempted
from horovod_owt.runs.attempts import last_restarts
from horovod_owt.runs.folder import OUTCOME, read_outcome
from horovod_owt.runs.records import last_step
from horovod_owt.slurm.client import find_jobs
from horovod_owt.slurm.commands import JobRecord


@dataclass(frozen=True)
class JobStatus:
    """A job's status; None for unknown values."""

    job_id: str
    state: str
    exit_code: int | None
    restarts: int | None
    step: int | None
    images_per_s: float | None
    run_dir: str | None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def job_status(job_id: str, run_dir: Path | None = None) -> JobStatus:
    """The job's status; raises ConfigError for a job that neither Slurm nor a run folder knows."""
    records = find_jobs(job_id)
    if len(records) > 1:
        parts = ", ".join(f"{record.job_id} {record.state}" for record in records)
        kind, part = ("heterogeneous", "components") if "+" in records[0].job_id else ("an array", "tasks")
        raise ConfigError(
            f"job {job_id} is {kind}: {parts}",
            wanted=f"one of its {part}",
            fix=f"owt job status {records[0].job_id}",
        )
    if records:
        return _from_slurm(records[0], run_dir)
    if run_dir is None:
        raise ConfigError(
            f"job {job_id} is unknown to Slurm, or ended too long ago",
            wanted="a recent job, or its run folder",
            fix=f"owt job status {job_id} --run-dir RUNS/NAME",
        )
    return _from_run_folder(job_id, run_dir)


def _from_slurm(record: JobRecord, run_dir: Path | None) -> JobStatus:
    run_dir = run_dir or _run_dir_in(record.comment)
    step, images_per_s = last_step(run_dir) if run_dir else (None, None)
    return JobStatus(
        job_id=record.job_id,
        state=record.state,
        exit_code=record.exit_code,
        restarts=record.restarts,
        step=step,
        images_per_s=images_per_s,
        run_dir=str(run_dir) if run_dir else None,
    )


def _run_dir_in(comment: str) -> Path | None:
    """The run folder that the batch process recorded; users may write comments too."""
    try:
        return Path(json.loads(comment)["run_dir"])
    except (ValueError, KeyError, TypeError):
        return None


def _from_run_folder(job_id: str, run_dir: Path) -> JobStatus:
    """The status of a finished run."""
    try:
        exit_code = read_outcome(run_dir)["exit_code"]
    except FileNotFoundError:
        raise ConfigError(
            f"{run_dir} has no {OUTCOME}: its run has not ended, or was killed",
            wanted="the --run-dir of a run that ended",
        ) from None
    step, images_per_s = last_step(run_dir)
    return JobStatus(
        job_id=job_id,
        state={0: "COMPLETED", Preempted.exit_code: "PREEMPTED"}.get(exit_code, "FAILED"),
        exit_code=exit_code,
        restarts=last_restarts(run_dir),
        step=step,
        images_per_s=images_per_s,
        run_dir=str(run_dir),
    )
