"""Slurm's commands as argv lists, and parsing of their output."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FINISHED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
FINISHED += ("BOOT_FAIL", "DEADLINE")
# Slurm may show these for a moment while it requeues a job that allows it.
REQUEUED_FROM = ("PREEMPTED", "NODE_FAIL", "BOOT_FAIL")
REQUEUED = "REQUEUED"  # Slurm's name for a job that waits to be requeued
NO_NODES = ("", "(null)", "None", "None assigned")  # of a job that has not started, by version of Slurm


def sbatch_argv(script: Path) -> list[str]:
    return ["sbatch", "--parsable", str(script)]


def scancel_argv(job_id: str) -> list[str]:
    return ["scancel", job_id]


def requeue_argv(job_id: str) -> list[str]:
    return ["scontrol", "requeue", job_id]


def show_job_argv(job_id: str) -> list[str]:
    return ["scontrol", "show", "job", job_id]


def hostnames_argv(node_list: str) -> list[str]:
    return ["scontrol", "show", "hostnames", node_list]


def comment_argv(job_id: str, comment: str) -> list[str]:
    return ["scontrol", "update", f"JobId={job_id}", f"Comment={comment}"]


@dataclass(frozen=True)
class JobRecord:
    """A job's record in slurmctld, kept for MinJobAge after its end."""

    number: str  # its SLURM_JOB_ID: each task of an array has its own
    job_id: str  # N; N_TASK in an array; N+COMPONENT in a heterogeneous job
    state: str
    exit_code: int | None  # 128 + the signal that ended it, as in a shell; None if Slurm has none
    restarts: int
    comment: str
    nodes: str  # in Slurm's list notation; without those lost under --no-kill; empty before the start


def parse_jobs(said: str) -> list[JobRecord]:
    """The records in the output of `scontrol show job`; arrays and heterogeneous jobs have several.

    Not with -o, which prints one line: a job named "x JobState=FAILED" would have two states.
    """
    return [_parse_job(part) for part in re.split(r"\n\s*\n", said) if part.lstrip().startswith("JobId=")]


def _parse_job(text: str) -> JobRecord:
    (state,) = _values(text, r"JobState=(\w+)")
    requeue, restarts, code, number = map(
        int, _values(text, r"Requeue=(\d+) Restarts=(\d+) .*ExitCode=(\d+):(\d+)")
    )
    if requeue and state in REQUEUED_FROM:
        state = REQUEUED
    ended = state in FINISHED and (code or (number and 128 + number))
    nodes = _values(text, r"NodeList=(.*)")[0].strip() if "\n   NodeList=" in text else ""
    first_line = text.lstrip().partition("\n")[0]
    return JobRecord(
        number=re.match(r"JobId=(\d+)", first_line)[1],
        job_id=_job_id(first_line),
        state=state,
        exit_code=0 if state == "COMPLETED" else ended or None,  # 0:0 of TIMEOUT, CANCELLED, ... is none
        restarts=restarts,
        comment=_values(text, r"Comment=(.*)")[0].strip() if "\n   Comment=" in text else "",
        nodes="" if nodes in NO_NODES else nodes,
    )


def _job_id(first_line: str) -> str:
    """The job's id as squeue writes it."""
    if array := re.match(r"JobId=\d+ ArrayJobId=(\d+) ArrayTaskId=(\S+)", first_line):
        return f"{array[1]}_{array[2]}"
    if component := re.match(r"JobId=\d+ HetJobId=(\d+) HetJobOffset=(\d+)", first_line):
        return f"{component[1]}+{component[2]}"
    return re.match(r"JobId=(\d+)", first_line)[1]


def _values(text: str, pattern: str) -> tuple[str, ...]:
    """The groups of the pattern, matched at the start of a line."""
    return re.search(rf"^ +{pattern}", text, re.MULTILINE).groups()
