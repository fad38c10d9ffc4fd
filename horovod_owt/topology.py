"""Where this process stands in its job, read from what the launcher put into the environment.

Only for what must be known before Horovod starts; afterwards `parallel.World` is the one to ask.
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
    """What starts a job's ranks, by the name that options, logs and `Topology` share."""

    GLOO = "gloo"  # horovodrun --gloo, and all that sets Horovod's own variables
    TORCHRUN = "torchrun"
    MPIRUN = "mpirun"  # Open MPI
    MPIRUN_RSH = "mpirun_rsh"  # MVAPICH2
    PMIX = "pmix"  # srun --mpi=pmix
    MPIEXEC = "mpiexec"  # MPICH, Intel MPI; srun --mpi=pmi2
    NONE = "none"

    __str__ = str.__str__


class Variables(NamedTuple):
    """The names under which a launcher tells each rank its place."""

    rank: str
    size: str
    local_rank: str = ""  # empty: only a Slurm step tells
    local_size: str = ""
    also: str = ""  # without this one, the names may be anybody's

    def are_in(self, env: Mapping[str, str]) -> bool:
        return all(name in env for name in (self.rank, self.size, self.also) if name)


# The first launcher whose rank and size are there wins. Horovod's own variables come first, then torchrun's:
# such ranks may live inside an mpirun or an srun.
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
    # Only ranks that srun --mpi=pmix started have both: a batch script may inherit PMIX_RANK from the shell
    # that submitted it, and has SLURM_NTASKS too.
    Launcher.PMIX: Variables("PMIX_RANK", "SLURM_STEP_NUM_TASKS"),
    Launcher.MPIEXEC: Variables("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}

# Rank and size in the words of launchers that Horovod cannot follow: PALS (Cray), Flux, jsrun (LSF), aprun
# (ALPS), a PMI or PMIx of another launcher, and whoever sets torch's variables without torchrun's store.
# The size has several names, or none.
UNKNOWN_LAUNCHERS = {
    "PALS_RANKID": ("PALS_NRANKS", "PMI_SIZE"),
    "FLUX_TASK_RANK": ("FLUX_JOB_SIZE",),
    "JSM_NAMESPACE_RANK": ("JSM_NAMESPACE_SIZE",),
    "ALPS_APP_PE": ("PMI_SIZE",),
    "PMI_RANK": ("PMI_SIZE",),
    "PMIX_RANK": (),
    "RANK": ("WORLD_SIZE",),
}

# Horovod's elastic driver gives up a whole host when one of its ranks dies. On one box `owt launch elastic`
# makes each place a host of its own: 127.0.0.1 with a further zero before the 1 for each place before it.
BOX_PLACES = "HOROVOD_OWT_BOX_PLACES"  # how many there are

# Set by whoever starts ranks by mpirun or srun and lets them bind none. A container's or a Slurm step's ranks
# may have fewer cores than the host and look bound, each to all of them.
UNBOUND = "HOROVOD_OWT_UNBOUND"


@dataclass(frozen=True)
class Topology:
    """Rank and size, over the job and within this host, as the launcher states them."""

    launcher: Launcher
    rank: int
    world_size: int
    local_rank: int
    local_size: int
    host: str
    unbound: bool = False  # by the launcher: the cores that this rank may use are its host's ranks' to share


def resolve_group_size(setting: int | str, topology: Topology) -> int:
    """`fc_group_size` as a number of ranks; ConfigError when the job has no whole number of such groups."""
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
    """The launcher's word on this process; a process started by none of them is rank 0 of 1.

    So is the one rank of a world of one, which needs no MPI: its variables may be leftovers of another job.
    """
    env = os.environ if env is None else env
    box = place_on_box(env)
    for launcher, names in LAUNCHERS.items():
        job = _rank_and_size(env, names.rank, names.size) if names.are_in(env) else None
        if job is None:
            continue
        local = box or _rank_and_size(env, names.local_rank, names.local_size) or _place_in_slurm_step(env)
        if local is None or (job[1] == 1 and launcher is not Launcher.GLOO):
            continue
        return Topology(
            launcher,
            *job,
            *local,
            host=socket.gethostname() if box else _host(env),
            unbound=launcher in (Launcher.GLOO, Launcher.TORCHRUN) or UNBOUND in env,
        )
    return Topology(Launcher.NONE, rank=0, world_size=1, local_rank=0, local_size=1, host=_host(env))


def rank_topology(env: Mapping[str, str] | None = None) -> Topology:
    """The same, for a command whose processes are to be ranks of one job.

    Raises ConfigError where the environment shows more than one rank, but no launcher that Horovod can
    follow: each would be rank 0 of 1, and all would write the same run folder.
    """
    env = os.environ if env is None else env
    topology = read_topology(env)
    if topology.launcher is Launcher.NONE:
        _refuse_unknown_launcher(env)
    return topology


def _refuse_unknown_launcher(env: Mapping[str, str]) -> None:
    # Only srun sets this one; a batch script and a shell of salloc have SLURM_NTASKS alone.
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
        else:  # rank 0 cannot know that it is not alone; the end of the others ends it
            several = bool(rank) and rank_name != "RANK"  # a name that any script may use
        if several:
            seen = [name for name in (rank_name, size_name) if name in env]
            told = " ".join(f"{name}={env[name]}" for name in seen)
            raise ConfigError(
                f"{told}: ranks of an unknown launcher",
                wanted="horovodrun, mpirun, torchrun or srun --mpi=pmix; for a run of one rank, no launcher",
                fix=f"`owt launch hosts --hosts FILE -- DATA --run-dir DIR`, or unset {' '.join(seen)}",
            ).by_rank_0((rank or 0) if size_name else rank - 1)


def _rank_and_size(env: Mapping[str, str], rank: str, size: str) -> tuple[int, int] | None:
    """None where one is missing or makes no sense: half of another job's variables are nobody's place."""
    numbers = _number(env, rank), _number(env, size)
    return numbers if None not in numbers and numbers[0] < numbers[1] else None


def _number(env: Mapping[str, str], name: str) -> int | None:
    return int(env[name]) if env.get(name, "").isdecimal() else None


def _host(env: Mapping[str, str]) -> str:
    return env.get("HOROVOD_HOSTNAME") or socket.gethostname()


def _place_in_slurm_step(env: Mapping[str, str]) -> tuple[int, int] | None:
    """Local rank and local size of a task that srun started, with pmix or pmi2; None elsewhere.

    Not from SLURM_NTASKS_PER_NODE, which is there only if it was asked for, and the same for all nodes.
    """
    node, local_rank = _number(env, "SLURM_NODEID"), _number(env, "SLURM_LOCALID")
    tasks_by_node = expand_counts(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if node is None or local_rank is None or node >= len(tasks_by_node):
        return None
    return local_rank, tasks_by_node[node]


def expand_counts(counts: str) -> list[int]:
    """Slurm's way to count by node: `4(x2),8` is 4, 4, 8."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def box_hosts(places: int) -> list[str]:
    """A host name for each place on one box; to resolvers all of them are 127.0.0.1."""
    return [f"127.0.0.{'0' * place}1" for place in range(places)]


def place_on_box(env: Mapping[str, str] | None = None) -> tuple[int, int] | None:
    """Local rank and local size of an elastic job's rank on one box; None for any other."""
    env = os.environ if env is None else env
    zeros = re.fullmatch(r"127\.0\.0\.(0*)1", env.get("HOROVOD_HOSTNAME", ""))
    return (len(zeros[1]), int(env[BOX_PLACES])) if zeros and BOX_PLACES in env else None
