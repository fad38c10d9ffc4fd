"""The specification of a job: sbatch options and the command to run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from horovod_owt.errors import ConfigError
from horovod_owt.slurm.times import EARLY_S, LEAST_S, seconds_in, warning_s
from horovod_owt.topology import Launcher

WARNING = "B:USR1@120"  # the default of --signal
AUTO = "auto"  # the first available one of these launchers
LAUNCHERS = (AUTO, *map(str, (Launcher.PMIX, Launcher.MPIRUN, Launcher.GLOO)))

# kind of job -> the owt command that its ranks run
KINDS = {
    "train": ("train",),
    "elastic": ("train",),
    "preflight": ("preflight",),
    "scaling": ("bench", "scaling"),
}


def _sbatch(text: str, default: str | bool = "") -> Any:
    """A field that is an sbatch option of the same name, with its help text."""
    return field(default=default, metadata={"sbatch": text})


@dataclass(frozen=True)
class JobSpec:
    """A job; an empty sbatch option leaves sbatch's default."""

    kind: str = "train"
    job_name: str = _sbatch("Job name.  [default: owt-KIND]")
    nodes: str = _sbatch("Number of nodes, or MIN-MAX.")
    ntasks_per_node: str = _sbatch("Ranks per node.  [default: one per GPU, at least one]")
    gpus_per_node: str = _sbatch("GPUs per node: N or TYPE:N.")
    gpus_per_task: str = _sbatch("GPUs per rank, which sees no others; requires --ntasks-per-node.")
    cpus_per_task: str = _sbatch("Cores per rank.")
    cpus_per_gpu: str = _sbatch("Cores per GPU.")
    mem: str = _sbatch("Memory per node.")
    time: str = _sbatch("Time limit of one attempt, such as 24:00:00.")
    partition: str = _sbatch("Partition.")
    account: str = _sbatch("Account.")
    qos: str = _sbatch("Quality of service.")
    constraint: str = _sbatch("Required node features.")
    exclusive: bool = _sbatch("Do not share nodes with other jobs.", default=False)
    array: str = _sbatch("Job array, such as 0-4%2; {task} in the command is replaced by the task number.")
    dependency: str = _sbatch("Dependency, such as afterok:1234.")
    output: str = _sbatch("Log file; %j is the job id.")
    signal: str = _sbatch(
        "Warning signal.  [default for train and elastic: B:USR1@120, 120 s before the time limit]"
    )
    extra: tuple[str, ...] = ()  # further options of sbatch, each as `--name=value`

    modules: tuple[str, ...] = ()  # environment modules
    venv: str = ""
    container_image: str = ""  # Pyxis
    apptainer: str = ""  # image
    container_mounts: str = ""  # SRC:DST,..., for either
    launcher: str = "auto"
    interface: str = ""  # of all nodes; empty: the one that reaches them
    max_restarts: int = 20
    min_ranks: int = 0  # of an elastic job; 0: half of them
    owt_args: tuple[str, ...] = ()  # DATA and options of the owt command

    def __post_init__(self) -> None:
        _check(self)

    @property
    def restarts(self) -> bool:
        """Whether a stopped job is requeued and resumes from a checkpoint."""
        return self.kind in ("train", "elastic")

    @property
    def elastic(self) -> bool:
        """Whether it continues after losing nodes."""
        return self.kind == "elastic"

    def sbatch_options(self) -> Iterator[str]:
        """All sbatch options as `--name=value`, not quoted."""
        filled = {"job_name": self.job_name or f"owt-{self.kind}"}
        if self.restarts:
            # B: to the batch process only, which forwards it; it would kill ranks still loading torch
            filled["signal"] = self.signal or WARNING
        if self.elastic:
            filled["exclusive"] = True  # ranks started by ssh run outside the job's cgroups
        for name in sbatch_fields():
            value = filled.get(name, getattr(self, name))
            if value:
                option = option_of(name)
                yield option if value is True else f"{option}={value}"
        if self.restarts:
            yield "--requeue"
        if self.elastic:
            yield "--no-kill"
        yield "--open-mode=append"  # all attempts in one log
        yield from self.extra


def sbatch_fields() -> dict[str, str]:
    """The fields that are sbatch options, in script order, with their help texts."""
    return {each.name: each.metadata["sbatch"] for each in fields(JobSpec) if "sbatch" in each.metadata}


def option_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check(spec: JobSpec) -> None:
    for option in spec.sbatch_options():
        name = option.partition("=")[0]
        if not option.startswith("--"):
            raise ConfigError(f"--sbatch {option}", wanted="an sbatch option", fix="--sbatch --NAME=VALUE")
        if not option.isprintable():  # sbatch reads options line by line, without an escape for newlines
            wanted = "printable characters: sbatch reads its options line by line"
            raise ConfigError(f"{name}={option.partition('=')[2]!r}", wanted=wanted)
    if any("\0" in word for word in (*spec.owt_args, *spec.modules, spec.venv)):
        raise ConfigError("a NUL byte in a path or an option", wanted="no NUL bytes")
    if spec.gpus_per_task and not spec.ntasks_per_node:
        raise ConfigError(
            "--gpus-per-task without a number of tasks",
            wanted="ranks per node",
            fix="--ntasks-per-node N, or --gpus-per-node instead",
        )
    if spec.restarts and (time_s := seconds_in(spec.time)) is not None:
        before_s = warning_s(spec.signal or WARNING)
        if time_s < before_s + EARLY_S + LEAST_S:
            raise ConfigError(
                f"--time {spec.time} with a warning {before_s} s before its end, or up to {EARLY_S} s sooner",
                wanted=f"more than {before_s + EARLY_S + LEAST_S} s, or the job is stopped as it starts",
                fix="a longer --time, or --signal B:USR1@30",
            )
    if spec.min_ranks and not spec.elastic:
        raise ConfigError(
            f"--min-ranks with --kind {spec.kind}", wanted="an elastic job", fix="--kind elastic"
        )
    if spec.elastic and (spec.container_image or spec.apptainer or spec.launcher != "auto"):
        raise ConfigError(
            "--kind elastic with a container or a launcher",
            wanted="neither: horovodrun starts the ranks by ssh",
            fix="--kind train",
        )
    if spec.container_image and spec.apptainer:
        raise ConfigError("--container-image and --apptainer", wanted="one of them")
    if spec.container_mounts and not (spec.container_image or spec.apptainer):
        raise ConfigError("--container-mounts without a container", fix="--container-image or --apptainer")
    if spec.container_image and spec.launcher == "mpirun":
        raise ConfigError(
            "--container-image with --launcher mpirun",
            wanted="srun: Pyxis is a plugin of it",
            fix="--launcher pmix",
        )
