"""This process's rank and size in its job, from the launcher's environment variables.

Only for use before Horovod starts; afterwards use `parallel.runtime.World`.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from horovod_owt.errors import ConfigError


class Launcher(str, Enum):
    """Launchers of ranks, by the names used in options, logs and `Topology`."""

    GLOO = "gloo"  # horovodrun --gloo, and anything else that sets Horovod's variables
    TORCHRUN = "torchrun"
    MPIRUN = "mpirun"  # Open MPI
    MPIRUN_RSH = "mpirun_rsh"  # MVAPICH2
    PMIX = "pmix"  # srun --mpi=pmix
    MPIEXEC = "mpiexec"  # MPICH, Intel MPI; srun --mpi=pmi2
    NONE = "none"

    __str__ = str.__str__


class Variables(NamedTuple):
    """The environment variables in which a launcher passes rank and size."""

    rank: str
    size: str
    local_rank: str = ""  # empty: taken from the Slurm step
    local_size: str = ""
    also: str = ""  # must be set too, because other programs use the other names

    def are_in(self, env: Mapping[str, str]) -> bool:
        return all(name in env for name in (self.rank, self.size, self.also) if name)


# The first launcher whose rank and size are set is used. Horovod's own variables come first, then torchrun's,
# because these launchers may run inside mpirun or srun.
LAUNCHERS = {
    Launcher.GLOO: Variables("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    Launcher.TORCHRUN: Variables(
        "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"
    ),
    Launcher.MPIRUN: Variables(
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher.MPIRUN_RSH: Variables(
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    # Only ranks started by srun --mpi=pmix have both: a batch script may inherit PMIX_RANK from the shell
    # that submitted it.
    Launcher.PMIX: Variables("PMIX_RANK", "SLURM_STEP_NUM_TASKS"),
    Launcher.MPIEXEC: Variables("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}

# Rank variables of unsupported launchers, with their possible size variables: PALS (Cray), Flux, jsrun (LSF),
# aprun (ALPS), PMI or PMIx of another launcher, and torch's variables without torchrun's store.
UNKNOWN_LAUNCHERS = {
    "PALS_RANKID": ("PALS_NRANKS", "PMI_SIZE"),
    "FLUX_TASK_RANK": ("FLUX_JOB_SIZE",),
    "JSM_NAMESPACE_RANK": ("JSM_NAMESPACE_SIZE",),
    "ALPS_APP_PE": ("PMI_SIZE",),
    "PMI_RANK": ("PMI_SIZE",),
    "PMIX_RANK": (),
    "RANK": ("WORLD_SIZE",),
}

# Horovod's elastic driver drops a whole host when one of its ranks dies. So on a single host, `owt launch
# elastic` gives each slot its own host name: 127.0.0.1, with more zeros before the last 1 for each further
# slot.
LOOPBACK_SLOTS = "HOROVOD_OWT_LOOPBACK_SLOTS"  # number of slots

# Set for ranks that mpirun or srun starts without binding. In a container or a Slurm step they have fewer
# cores than the host, so they would look bound.
UNBOUND = "HOROVOD_OWT_UNBOUND"


@dataclass(frozen=True)
class Topology:
    """Rank and size, within the job and within this host, as set by the launcher."""

    launcher: Launcher
    rank: int
    world_size: int
    local_rank: int
    local_size: int
    host: str
    unbound: bool = False  # the launcher bound no cores: the host's ranks share them


def resolve_group_size(setting: int | str, topology: Topology) -> int:
    """`fc_group_size` as a number of ranks; ConfigError if it does not divide the number of ranks."""
    ranks = topology.world_size
    size = {"all": ranks, "node": topology.local_size}.get(setting, setting)
    if ranks % size:
        choices = [str(n) for n in range(1, ranks + 1) if ranks % n == 0]
        asked = f"fc_group_size={setting}" + (
            f" ({size} ranks on {topology.host})" if setting == "node" else ""
        )
        raise ConfigError(
            f"{asked} in a job of {ranks} ranks",
            wanted=f"whole groups: {', '.join(choices)}",
            fix=f"--set fc_group_size={choices[-2 if len(choices) > 1 else -1]}",
        )
    return size


def read_topology(env: Mapping[str, str] | None = None) -> Topology:
    """This process's rank and size as set by its launcher; without a launcher, rank 0 of 1.

    A job of one rank counts as without a launcher, since the variables may be inherited from another job.
    """
    env = os.environ if env is None else env
    loopback = loopback_place(env)
    for launcher, names in LAUNCHERS.items():
        job = _rank_and_size(env, names.rank, names.size) if names.are_in(env) else None
        if job is None:
            continue
        local = (
            loopback or _rank_and_size(env, names.local_rank, names.local_size) or _place_in_slurm_step(env)
        )
        if local is None or (job[1] == 1 and launcher is not Launcher.GLOO):
            continue
        return Topology(
            launcher,
            *job,
            *local,
            host=socket.gethostname() if loopback else _host(env),
            unbound=launcher in (Launcher.GLOO, Launcher.TORCHRUN) or UNBOUND in env,
        )
    return Topology(Launcher.NONE, rank=0, world_size=1, local_rank=0, local_size=1, host=_host(env))


def rank_topology(env: Mapping[str, str] | None = None) -> Topology:
    """`read_topology` for commands whose processes are ranks of one job.

    Raises ConfigError under an unsupported launcher of several ranks: each process would be rank 0 of 1, and
    all would write to the same run folder.
    """
    env = os.environ if env is None else env
    topology = read_topology(env)
    if topology.launcher is Launcher.NONE:
        _refuse_unknown_launcher(env)
    return topology


def _refuse_unknown_launcher(env: Mapping[str, str]) -> None:
    # Only srun sets this variable; batch scripts and salloc shells have SLURM_NTASKS only.
    if (tasks := _number(env, "SLURM_STEP_NUM_TASKS") or 1) > 1:
        raise ConfigError(
            f"{tasks} srun tasks started without PMI",
            wanted="ranks of one job",
            fix="srun --mpi=pmix, or `owt job submit`; for a job in each task, --array",
        ).by_rank_0(_number(env, "SLURM_PROCID") or 0)
    for rank_name, size_names in UNKNOWN_LAUNCHERS.items():
        rank = _number(env, rank_name)
        size_name = next((name for name in size_names if _number(env, name) is not None), "")
        if size_name:
            several = _number(env, size_name) > 1 and (rank is not None or size_name == "WORLD_SIZE")
        else:  # rank 0 cannot detect the others; the launcher ends it when they fail
            several = bool(rank) and rank_name != "RANK"  # a name that other programs use too
        if several:
            seen = [name for name in (rank_name, size_name) if name in env]
            shown = " ".join(f"{name}={env[name]}" for name in seen)
            error = ConfigError(
                f"{shown}: ranks of an unknown launcher",
                wanted="horovodrun, mpirun, torchrun or srun --mpi=pmix; for a run of one rank, no launcher",
                fix=f"`owt launch hosts --hosts FILE -- DATA --run-dir DIR`, or unset {' '.join(seen)}",
            )
            # containers with a log each have RANK, and shells in which it is left: there each process prints
            raise error if rank_name == "RANK" else error.by_rank_0((rank or 0) if size_name else rank - 1)


def _rank_and_size(env: Mapping[str, str], rank: str, size: str) -> tuple[int, int] | None:
    """Rank and size; None if they are missing, or inconsistent because inherited from another job."""
    numbers = _number(env, rank), _number(env, size)
    return numbers if None not in numbers and numbers[0] < numbers[1] else None


def _number(env: Mapping[str, str], name: str) -> int | None:
    return int(env[name]) if env.get(name, "").isdecimal() else None


def _host(env: Mapping[str, str]) -> str:
    return env.get("HOROVOD_HOSTNAME") or socket.gethostname()


def _place_in_slurm_step(env: Mapping[str, str]) -> tuple[int, int] | None:
    """Local rank and local size of a task that srun started; None otherwise.

    Not from SLURM_NTASKS_PER_NODE, which is only set on request, and is the same for all nodes.
    """
    node, local_rank = _number(env, "SLURM_NODEID"), _number(env, "SLURM_LOCALID")
    tasks_by_node = expand_counts(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if node is None or local_rank is None or node >= len(tasks_by_node):
        return None
    return local_rank, tasks_by_node[node]


def expand_counts(counts: str) -> list[int]:
    """Expand Slurm's counts per node: `4(x2),8` is 4, 4, 8."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def loopback_hosts(slots: int) -> list[str]:
    """A host name for each slot of a single host; all of them resolve to 127.0.0.1."""
    return [f"127.0.0.{'0' * slot}1" for slot in range(slots)]


def loopback_place(env: Mapping[str, str] | None = None) -> tuple[int, int] | None:
    """Local rank and local size of a rank of an elastic job on a single host; None for other jobs."""
    env = os.environ if env is None else env
    zeros = re.fullmatch(r"127\.0\.0\.(0*)1", env.get("HOROVOD_HOSTNAME", ""))
    return (len(zeros[1]), int(env[LOOPBACK_SLOTS])) if zeros and LOOPBACK_SLOTS in env else None


def require_single_process(what: str) -> None:
    """Raise ConfigError under a launcher of several ranks, each of which would do all of the work."""
    if read_topology().world_size > 1:
        raise ConfigError(f"{what} under a launcher", wanted="one process", fix="run it without")
