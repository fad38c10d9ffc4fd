"""The batch process of a job, `owt job run`: starts the ranks, forwards signals and requeues the job."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from horovod_owt.errors import ConfigError, OwtError
from horovod_owt.launch.command import check_folder_for_ssh
from horovod_owt.launch.elastic import ElasticJob
from horovod_owt.launch.supervisor import Supervisor, reason_not_to_restart
from horovod_owt.parallel.interfaces import chosen_interface
from horovod_owt.runs.attempts import JOB, AttemptWatch, append_attempt, earlier_attempts, find_run_dir
from horovod_owt.slurm.allocation import Allocation, node_list, read_allocation
from horovod_owt.slurm.client import ask, find_job, find_jobs, mpi_types, start_ranks
from horovod_owt.slurm.commands import comment_argv, hostnames_argv, requeue_argv
from horovod_owt.slurm.container import NO_CONTAINER, Container
from horovod_owt.slurm.launchers import (
    choose_launcher,
    horovod_has_mpi,
    launcher_environment,
    ranks_argv,
)
from horovod_owt.slurm.nodes import nodes_file
from horovod_owt.slurm.spec import AUTO, JobSpec
from horovod_owt.topology import Launcher

STOP = signal.SIGUSR1  # sent to srun or mpirun, which forward it to the ranks; TERM would end them
WARNINGS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
REQUEUE_LIMIT_S = 60  # from a requeue to the TERM that it causes
TASK = "{task}"  # in options of an array job: replaced by the task number


def run_job(
    command: Sequence[str],
    *,
    launcher: str = AUTO,
    interface: str = "",
    max_restarts: int = JobSpec.max_restarts,
    elastic: bool = False,
    min_ranks: int = 0,
    container: Container = NO_CONTAINER,
) -> int:
    """Run `owt` with this command line on the job's ranks; returns the job's exit code."""
    forget_array_of_submitter(os.environ)
    allocation = read_allocation(os.environ, ask(hostnames_argv(node_list(os.environ))).split())
    command = ["owt", *owt_args(command, allocation)]
    interface = chosen_interface(interface or None, list(allocation.hosts))
    if elastic:
        return train(ElasticRanks(allocation, min_ranks, interface), command, max_restarts)
    chosen, why = choose_launcher(
        launcher,
        srun_mpi=mpi_types(),
        mpirun=shutil.which("mpirun"),
        # a container's contents are not visible from here
        horovod_mpi=bool(container) or horovod_has_mpi(),
    )
    log_start(allocation, chosen, why, interface)
    job = Ranks(allocation, chosen, interface, container)
    if command[1] == "train":
        return train(job, command, max_restarts)
    code = job.run(command)
    return 128 - code if code < 0 else code  # as shells report a signal


def forget_array_of_submitter(env: MutableMapping[str, str]) -> None:
    """Remove the array variables of a task that submitted this job: sbatch passes them on.

    With them the job would take that task for itself, and requeue it.
    """
    if "SLURM_ARRAY_JOB_ID" not in env or "SLURM_ARRAY_TASK_ID" not in env:
        return
    try:
        tasks = find_jobs(f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}")
    except OwtError as error:
        say(f"WARNING {error}")
        return
    if all(task.number != env.get("SLURM_JOB_ID") for task in tasks):
        for name in [name for name in env if name.startswith("SLURM_ARRAY_")]:
            del env[name]


def log_start(allocation: Allocation, launcher: Launcher, why: str, interface: str) -> None:
    hosts, ranks = len(allocation.hosts), allocation.ranks_per_node
    say(
        f"job {allocation.job_id} start {allocation.restarts + 1}: {hosts} nodes x {ranks} ranks, "
        f"launcher {launcher} ({why}), interface {interface}"
    )
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    if gpus.isdecimal() and int(gpus) > ranks:
        say(f"WARNING {ranks} of the {gpus} GPUs on a node in use; fix: --ntasks-per-node {gpus}")
    if allocation.crowded:
        say(
            f"WARNING {ranks} ranks share {allocation.cpus_per_node} CPU on a node; "
            "fix: --cpus-per-gpu, --cpus-per-task or --exclusive"
        )


def owt_args(command: Sequence[str], allocation: Allocation) -> list[str]:
    """The command with the array task number filled in, and a run folder that is the same in all attempts."""
    args = [word.replace(TASK, allocation.task) for word in command] if allocation.task else list(command)
    if command[0] != "train":
        return args
    if find_run_dir(args) is None:
        return [*args, "--run-dir", f"runs/slurm-{allocation.job_id}"]
    if allocation.task and find_run_dir(command) == find_run_dir(args):
        raise ConfigError(
            f"one --run-dir for all tasks of an array: {find_run_dir(args)}",
            wanted="one per task",
            fix=f"--run-dir {find_run_dir(args)}-{TASK}",
        )
    return args


class Ranks:
    """Runs the ranks, and forwards Slurm's signals to end the job."""

    def __init__(
        self, allocation: Allocation, launcher: Launcher, interface: str, container: Container
    ) -> None:
        self.allocation, self._launcher, self._interface = allocation, launcher, interface
        self._container = container
        self._ranks: subprocess.Popen | None = None
        self.asked_to_stop = False
        for number in WARNINGS:
            signal.signal(number, self._pass_on)

    def run(self, command: list[str]) -> int:
        """Run to the end; returns the launcher's exit code, negative for a signal."""
        argv = ranks_argv(self._launcher, self.allocation, command, self._container)
        with launcher_environment(self._launcher, self.allocation, self._interface) as env:
            self._ranks = start_ranks(argv, {**env, **self._container.environment(os.environ)})
            if self.asked_to_stop:  # while it was started
                self._ranks.terminate()
            return self._ranks.wait()

    def _pass_on(self, number: int, _frame: object) -> None:
        if self.asked_to_stop:
            return
        self.asked_to_stop = True
        say(f"{signal.Signals(number).name}: the ranks stop at a checkpoint")
        if self._ranks is not None:
            self._ranks.send_signal(STOP)


class ElasticRanks:
    """The same for an elastic job, which survives the loss of nodes (--no-kill)."""

    def __init__(self, allocation: Allocation, min_ranks: int, interface: str) -> None:
        self.allocation, self._interface, self.asked_to_stop = allocation, interface, False
        self._min_ranks = min_ranks or (allocation.world_size + 1) // 2
        if self._min_ranks > allocation.world_size:
            raise ConfigError(
                f"--min-ranks {self._min_ranks} in a job of {allocation.world_size} ranks",
                wanted="at most as many as there are",
            )
        if len(allocation.hosts) > 1:
            check_folder_for_ssh(os.getcwd())
        log_start(allocation, Launcher.GLOO, f"elastic, at least {self._min_ranks} ranks, by ssh", interface)

    def run(self, command: list[str]) -> int:
        with nodes_file(self.allocation, say) as hosts_file:
            elastic = ElasticJob(
                command[2:],
                interface=self._interface,
                hosts_file=hosts_file,
                min_ranks=self._min_ranks,
            )
            attempt = Supervisor(elastic.argv(), patient=True).run_once()
        self.asked_to_stop = attempt.asked_to_stop
        return attempt.exit_code


def train(job: Ranks | ElasticRanks, command: list[str], max_restarts: int) -> int:
    """Run one attempt of a training job, and requeue the job if another attempt can make progress."""
    run_dir = find_run_dir(command).absolute()
    leave_run_dir(job.allocation.job_id, run_dir)
    os.environ[JOB] = f"slurm-{job.allocation.job_id}"
    watch = AttemptWatch(run_dir)
    code = job.run(command)
    last = watch.attempt(code, asked_to_stop=job.asked_to_stop)
    attempts = [*earlier_attempts(run_dir, job.allocation.job_id), last]
    try:
        append_attempt(run_dir, last, start=watch.start, restarts=job.allocation.restarts)
    except OSError as error:
        say(f"WARNING {error.filename}: {error.strerror}")
    say(f"exit code {last.exit_code} after step {last.last_step}: {last.reason}")
    restarts = job.allocation.restarts
    if why := reason_not_to_restart(attempts, max_restarts, restarts=restarts, stop_is_final=False):
        say(f"not requeued: {why}")
    else:
        start = f"start {restarts + 2} of {max_restarts + 1}, from {last.checkpoint or 'the beginning'}"
        requeue(job.allocation.job_id, start)
    return last.exit_code


def requeue(job_id: str, start: str) -> None:
    """Requeue the job, and wait for the TERM that follows."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        record = find_job(job_id)
        if record.state != "RUNNING":  # cancelled, which a requeue would undo, or preempted
            say(f"job is {record.state}; not requeueing")
            return
        say(f"requeued, {start}")
        ask(requeue_argv(job_id))
    except OwtError as error:  # --no-requeue, or not allowed by the site
        say(f"requeue failed: {error}")
        return
    signal.sigtimedwait({signal.SIGTERM}, REQUEUE_LIMIT_S)  # exiting earlier could count as the job's end


def leave_run_dir(job_id: str, run_dir: Path) -> None:
    """Record the run folder in the job's comment, for `owt job status`, unless the user has set one."""
    comment = json.dumps({"run_dir": str(run_dir)})
    try:
        record = find_job(job_id)
        if not record.comment:
            ask(comment_argv(job_id, comment))
        elif record.comment != comment:
            say(f"the job has a comment already: `owt job status` needs --run-dir {run_dir}")
    except OwtError as error:  # training does not depend on it
        say(f"WARNING cannot set the job's comment: {error}; `owt job status` needs --run-dir {run_dir}")


def say(line: str) -> None:
    print(f"job: {line}", file=sys.stderr, flush=True)
