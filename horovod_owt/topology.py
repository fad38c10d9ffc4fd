"""Where this process stands in its job, read from what the launcher put into the environment.

Only for what must be known before Horovod starts; afterwards `parallel.World` is the one to ask.
"""

from __future__ import annotations

import os
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
    # A batch script has SLURM_PROCID too; only ranks that srun --mpi=pmix started have this.
    "srun": ("PMIX_RANK", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI
}


@dataclass(frozen=True)
class Topology:
    """Rank and size, over the job and within this host, as the launcher states them."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_size: int
    host: str


def resolve_group_size(setting: str, topology: Topology) -> int:
    """`fc_group_size` as a number of ranks; ConfigError when the job has no whole number of such groups."""
    ranks = topology.world_size
    size = {"all": ranks, "node": topology.local_size}.get(setting) or int(setting)
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
    for launcher, (rank, size, local_rank, local_size) in LAUNCHERS.items():
        if rank in env:
            return Topology(
                launcher,
                rank=int(env[rank]),
                world_size=int(env[size]),
                local_rank=int(env.get(local_rank, 0)),
                local_size=int(env.get(local_size, 1)),
                host=host,
            )
    return Topology("none", rank=0, world_size=1, local_rank=0, local_size=1, host=host)
