"""What a user asks of Slurm and of owt, as one frozen value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from horovod_owt.errors import ConfigError
from horovod_owt.topology import Launcher

AUTO = "auto"  # the first of these launchers that the site has
LAUNCHERS = (AUTO, *map(str, (Launcher.PMIX, Launcher.MPIRUN, Launcher.GLOO)))

# kind of job -> the owt command that its ranks run
KINDS = {
    "train": ("train",),
    "elastic": ("train",),
    "preflight": ("preflight",),
    "scaling": ("bench", "scaling"),
}


def _sbatch(text: str, default: str | bool = "") -> Any:
    """A field that is an option of sbatch by its own name, and what `--help` says of it."""
    return field(default=default, metadata={"sbatch": text})


@dataclass(frozen=True)
class JobSpec:
    """A job; empty options of sbatch leave it its own default."""

    kind: str = "train"
    job_name: str = _sbatch("Default: owt-KIND.")
    nodes: str = _sbatch("A number, or MIN-MAX.")
    ntasks_per_node: str = _sbatch("Ranks of a node. Default: one for each GPU, or one where there is none.")
    gpus_per_node: str = _sbatch("N, or TYPE:N.")
    gpus_per_task: str = _sbatch("Each rank sees its own only; with --ntasks-per-node.")
    cpus_per_task: str = _sbatch("Cores for a rank.")
    cpus_per_gpu: str = _sbatch("Cores for a GPU's rank.")
    mem: str = _sbatch("Of a node.")
    time: str = _sbatch("Limit of one start, such as 24:00:00.")
    partition: str = _sbatch("")
    account: str = _sbatch("")
    qos: str = _sbatch("")
    constraint: str = _sbatch("Features that nodes must have.")
    exclusive: bool = _sbatch("Nodes of its own.", default=False)
    array: str = _sbatch("Such as 0-4%2; {task} in what follows -- becomes the task's number.")
    dependency: str = _sbatch("Such as afterok:1234.")
    output: str = _sbatch("The log's name; %j is the job.")
    signal: str = _sbatch("Default for train and elastic: B:USR1@120, a warning 120 s before the time limit.")
    extra: tuple[str, ...] = ()  # further options of sbatch, each as `--name=value`

    modules: tuple[str, ...] = ()  # environment modules
    venv: str = ""
    container_image: str = ""  # Pyxis
    apptainer: str = ""  # image
    launcher: str = "auto"
    max_restarts: int = 20
    min_ranks: int = 0  # of an elastic job; 0: half of them
    owt_args: tuple[str, ...] = ()  # DATA and options of the owt command

    def __post_init__(self) -> None:
        _check(self)

    @property
    def restarts(self) -> bool:
        """Whether a stopped job goes back to the queue, to go on from a checkpoint."""
        return self.kind in ("train", "elastic")

    @property
    def elastic(self) -> bool:
        """Whether it goes on without the nodes that it loses."""
        return self.kind == "elastic"

    def sbatch_options(self) -> Iterator[str]:
        """`--name=value`, not quoted yet."""
        filled = {"job_name": self.job_name or f"owt-{self.kind}"}
        if self.restarts:
            # B: to the batch process alone, which passes it on; to ranks that still load torch it is deadly
            filled["signal"] = self.signal or "B:USR1@120"
        if self.elastic:
            filled["exclusive"] = True  # ssh starts the ranks outside of what Slurm has set apart for the job
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
    """The fields that are options of sbatch, in the order in which a script has them, with their help."""
    return {each.name: each.metadata["sbatch"] for each in fields(JobSpec) if "sbatch" in each.metadata}


def option_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check(spec: JobSpec) -> None:
    for option in spec.sbatch_options():
        name = option.partition("=")[0]
        if not option.startswith("--"):
            raise ConfigError(
                f"--sbatch {option}", wanted="an option as sbatch has it", fix="--sbatch --NAME=VALUE"
            )
        if not option.isprintable():  # sbatch reads options line by line, and has no escape for a line's end
            wanted = "printable characters: sbatch reads its options line by line"
            raise ConfigError(f"{name}={option.partition('=')[2]!r}", wanted=wanted)
    if any("\0" in word for word in (*spec.owt_args, *spec.modules, spec.venv)):
        raise ConfigError("a NUL in a path or an option", wanted="none: the system takes no such word")
    if spec.gpus_per_task and not spec.ntasks_per_node:
        raise ConfigError(
            "--gpus-per-task without a number of tasks",
            wanted="ranks of a node",
            fix="--ntasks-per-node N, or --gpus-per-node in its place",
        )
    if spec.min_ranks and not spec.elastic:
        raise ConfigError(
            f"--min-ranks with --kind {spec.kind}", wanted="a job that may lose ranks", fix="--kind elastic"
        )
    if spec.elastic and (spec.container_image or spec.apptainer or spec.launcher != "auto"):
        raise ConfigError(
            "--kind elastic with a container or a launcher",
            wanted="neither: horovodrun starts its ranks by ssh",
            fix="--kind train",
        )
    if spec.container_image and spec.apptainer:
        raise ConfigError("--container-image and --apptainer", wanted="one of them")
    if spec.container_image and spec.launcher == "mpirun":
        raise ConfigError(
            "--container-image with --launcher mpirun",
            wanted="srun, whose plugin Pyxis is",
            fix="--launcher pmix",
        )
