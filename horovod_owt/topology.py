"""Where this process stands in its job, read from what the launcher put into the environment.

Only for what must be known before Horovod starts; afterwards `parallel.World` is the one to ask.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from horovod_owt.errors import ConfigError

# launcher -> its variables for rank, world size, local rank, local size. The first whose rank is set wins;
# horovodrun comes first: its workers may themselves live inside an mpirun or an srun.
LAUNCHERS = {
    "horovodrun": ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    "mpirun": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpirun_rsh": (  # MVAPICH2
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    # A batch script has SLURM_PROCID too; only ranks that srun --mpi=pmix started have this.
    "srun": ("PMIX_RANK", "SLURM_NTASKS", "", ""),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI
}

# Horovod's elastic driver gives up a whole host when one of its ranks dies. On one box launch/elastic makes
# each place a host of its own: 127.0.0.1 with as many more zeros before the 1 as there are places before it.
BOX_PLACES = "HOROVOD_OWT_BOX_PLACES"  # how many there are

# Set by whoever starts ranks by mpirun or srun and lets them bind none. A container's or a Slurm step's ranks
# may have fewer cores than the host and look bound, each to all of them.
UNBOUND = "HOROVOD_OWT_UNBOUND"


@dataclass(frozen=True)
class Topology:
    """Rank and size, over the job and within this host, as the launcher states them."""

    launcher: str
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
    """The launcher's word on this process; a process started by none of them is rank 0 of 1."""
    env = os.environ if env is None else env
    host = env.get("HOROVOD_HOSTNAME") or socket.gethostname()
    place = place_on_box(env)
    for launcher, (rank, size, local_rank, local_size) in LAUNCHERS.items():
        if rank in env:
            if place:
                local = place
            elif local_rank in env:
                local = int(env[local_rank]), int(env[local_size])
            else:
                local = _place_in_slurm_step(env)
            return Topology(
                launcher,
                rank=int(env[rank]),
                world_size=int(env[size]),
                local_rank=local[0],
                local_size=local[1],
                host=socket.gethostname() if place else host,
                unbound=launcher == "horovodrun" or UNBOUND in env,
            )
    return Topology("none", rank=0, world_size=1, local_rank=0, local_size=1, host=host)


def rank_topology(env: Mapping[str, str] | None = None) -> Topology:
    """The same, for a command whose processes are to be ranks of one job.

    Raises ConfigError in tasks that srun did not tell of each other: each would be rank 0 of 1.
    """
    env = os.environ if env is None else env
    topology = read_topology(env)
    # Only what srun started has it; a batch script and a shell of salloc have SLURM_NTASKS alone.
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    if topology.launcher == "none" and tasks > 1:
        raise ConfigError(
            f"{tasks} tasks of srun that do not know of each other",
            wanted="ranks of one job",
            fix="srun --mpi=pmix, or sbatch slurm/train.sbatch; for a job in each task, --array",
        ).by_rank_0(int(env["SLURM_PROCID"]))
    return topology


def _place_in_slurm_step(env: Mapping[str, str]) -> tuple[int, int]:
    """Local rank and local size of a task that srun started, with pmix or pmi2; else those of a lone rank.

    Not from SLURM_NTASKS_PER_NODE, which is there only if it was asked for, and the same for all nodes.
    """
    if "SLURM_STEP_TASKS_PER_NODE" not in env:
        return 0, 1
    tasks_by_node = expand_counts(env["SLURM_STEP_TASKS_PER_NODE"])
    return int(env["SLURM_LOCALID"]), tasks_by_node[int(env["SLURM_NODEID"])]


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
