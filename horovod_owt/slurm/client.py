"""Runs Slurm's commands."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence

from horovod_owt.errors import ConfigError, RunError
from horovod_owt.filesystem import temporary_folder
from horovod_owt.slurm.commands import JobRecord, parse_jobs, sbatch_argv, scancel_argv, show_job_argv
from horovod_owt.text import encode

# Options of sbatch that srun would take for its own: --export, and --ntasks-per-gpu, which it refuses beside
# --ntasks-per-node, given by us and by mpirun.
NOT_FOR_SRUN = ("SLURM_EXPORT_ENV", "SRUN_EXPORT_ENV", "SLURM_NTASKS_PER_GPU", "SLURM_NTASKS_PER_TRES")
# Each is the memory of a job. srun refuses two, as in a job that was submitted from another one; with none it
# gives the ranks all memory of the job.
MEMORY = ("SLURM_MEM_PER_CPU", "SLURM_MEM_PER_GPU", "SLURM_MEM_PER_NODE")
OF_A_JOB = ("SLURM_", "SLURMD_", "SRUN_")  # how Slurm's variables in a job begin
OF_A_SITE = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_HINT", "SLURM_JWT")  # may be set outside of jobs too
LIMIT_S = 60.0  # for slurmctld to answer


def submit(script: str) -> str:
    """Submit a script with sbatch; returns the job id. Without a limit: `--wait` waits for the job's end."""
    with temporary_folder("owt-job-") as folder:
        file = folder / "job.sbatch"  # sbatch copies it
        file.write_bytes(encode(script))
        said = ask(sbatch_argv(file), env=_outside_of_jobs(os.environ), limited=False)
    # ID, or ID;CLUSTER; the sbatch of some sites prints lines of its own, too, or does not know --parsable
    ids = re.findall(r"^(?:Submitted batch job )?(\d+)(?:;.*| on cluster .*)?$", said, re.MULTILINE)
    if not ids:
        raise RunError(
            f"sbatch printed no job id: {' '.join(said.split())!r}", fix="look for it: `squeue --me`"
        )
    return ids[-1]


def _outside_of_jobs(env: Mapping[str, str]) -> dict[str, str]:
    """`env` without the variables of the Slurm job that this process runs in, if it does.

    sbatch would pass them on, and sets only those that it has an option for: the new job would take the
    number of tasks, or the array and the task, of this one for its own.
    """
    if "SLURM_JOB_ID" not in env:
        return dict(env)
    return {name: value for name, value in env.items() if name in OF_A_SITE or not name.startswith(OF_A_JOB)}


def find_jobs(job_id: str) -> list[JobRecord]:
    """Slurm's records of the job: one, or one per array task; none if it is no longer known."""
    try:
        return parse_jobs(ask(show_job_argv(job_id)))
    except RunError as error:
        # "Job 7_2 not found" of a task, while Slurm knows others of its array
        if re.search(r"Invalid job id|Job \S+ not found", str(error)):
            return []
        raise


def find_job(job_id: str) -> JobRecord:
    """Slurm's record of one job, or of one task of an array; RunError if it has none, or several."""
    records = find_jobs(job_id)
    if len(records) != 1:
        raise RunError(f"Slurm has {len(records) or 'no'} record{'s'[: len(records) > 1]} of job {job_id}")
    return records[0]


def mpi_types() -> str:
    """What `srun --mpi=list` prints: to stderr before Slurm 22.05."""
    return ask(["srun", "--mpi=list"], or_stderr=True)


def cancel(job_id: str) -> None:
    ask(scancel_argv(job_id))


def ask(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    limited: bool = True,
    or_stderr: bool = False,
) -> str:
    """The stdout of a short command, with `or_stderr` its stderr if stdout is empty; RunError if it fails."""
    try:
        done = subprocess.run(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=LIMIT_S if limited else None,
            check=True,
        )
    except FileNotFoundError:
        raise ConfigError(
            f"{argv[0]} not found", wanted="Slurm's commands on PATH", fix="run this on a login node"
        ) from None
    except subprocess.TimeoutExpired:
        raise RunError(
            f"{argv[0]} did not answer within {LIMIT_S:g} s", fix="check slurmctld with `scontrol ping`"
        ) from None
    except subprocess.CalledProcessError as error:
        said = " ".join((error.stderr.strip() or error.stdout).split()) or f"exit code {error.returncode}"
        raise RunError(f"{argv[0]}: {said.removeprefix(f'{argv[0]}: ').removeprefix('error: ')}") from None
    return done.stdout or (done.stderr if or_stderr else "")


def start_ranks(argv: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen:
    """Start srun or mpirun in its own session, so that it does not get the batch process's signals.

    Ranks get the batch process's full environment, whatever sbatch --export was, save for what would mislead
    srun, also below mpirun.
    """
    several = MEMORY if sum(name in os.environ for name in MEMORY) > 1 else ()
    whole = {name: value for name, value in os.environ.items() if name not in (*NOT_FOR_SRUN, *several)}
    return subprocess.Popen(
        argv,
        env={**whole, **env},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        restore_signals=False,  # SIGPIPE stays ignored
    )
