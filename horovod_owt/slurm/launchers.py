"""Start ranks inside a job: choice of launcher, command line, environment."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from horovod_owt.errors import ConfigError
from horovod_owt.parallel.gloo import Node, rendezvous_environment
from horovod_owt.parallel.interfaces import interface_environment, ipv4_address_of
from horovod_owt.slurm.allocation import Allocation
from horovod_owt.slurm.container import NO_CONTAINER, Container
from horovod_owt.slurm.spec import AUTO
from horovod_owt.topology import UNBOUND, Launcher

# Options of sbatch for each task or GPU. The srun below mpirun would take them for mpirun's daemons, one on
# each node; since Slurm 24.05 it refuses SRUN_CPUS_PER_TASK beside another number in SLURM_TRES_PER_TASK.
NOT_FOR_DAEMONS = ("SLURM_CPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_CPUS_PER_GPU", "SLURM_GPUS_PER_TASK")
NOT_FOR_DAEMONS += ("SLURM_GPU_BIND", "SLURM_TRES_BIND")


def choose_launcher(
    asked: str, *, srun_mpi: str, mpirun: str | None, horovod_mpi: bool
) -> tuple[Launcher, str]:
    """The launcher and the reason; `srun_mpi` is the output of `srun --mpi=list`.

    Raises ConfigError if the requested one is not available.
    """
    no_mpi = "" if horovod_mpi else "Horovod has no MPI"
    lacks = {  # the first one that lacks nothing is used
        Launcher.PMIX: no_mpi if re.search(r"\bpmix", srun_mpi) else "srun has no pmix",
        Launcher.MPIRUN: no_mpi if mpirun else "no mpirun on PATH",
        Launcher.GLOO: "",
    }
    if asked != AUTO:
        launcher = Launcher(asked)
        if lacks[launcher]:
            raise ConfigError(f"--launcher {asked}, but {lacks[launcher]}", fix="--launcher auto")
        return launcher, "set by --launcher"
    chosen = next(name for name, lack in lacks.items() if not lack)
    return chosen, ", ".join(lack for lack in lacks.values() if lack) or "srun has pmix, Horovod has MPI"


def horovod_has_mpi() -> bool:
    """Whether the installed Horovod is linked with MPI, without loading torch."""
    spec = find_spec("horovod")
    libraries = Path(spec.origin).parent.glob("torch/mpi_lib*.so") if spec else []
    return any(b"libmpi.so" in library.read_bytes() for library in libraries)


def ranks_argv(
    launcher: Launcher,
    allocation: Allocation,
    command: Sequence[str],
    container: Container = NO_CONTAINER,
) -> list[str]:
    """The command line that starts `command` on every rank, in a container if one is given.

    Without a container, full paths are used: mpirun's daemons put their own folder first on PATH.
    """
    if launcher is Launcher.GLOO:
        command = ["owt", "job", "rank", *command]
    if not container:
        command = [shutil.which(command[0]) or command[0], *command[1:]]
    command = container.wrapped(command)
    if launcher is Launcher.MPIRUN:
        return [*mpirun_argv(allocation), *command]
    mpi = "pmix" if launcher is Launcher.PMIX else "none"
    return [*srun_argv(allocation, mpi=mpi), *container.srun_options(), *command]


def srun_argv(allocation: Allocation, *, mpi: str) -> list[str]:
    """No binding by srun: ranks choose their cores themselves, as under every launcher.

    Since 22.05 a step gets only the cores that it requests, whatever sbatch requested. A host's ranks are
    consecutive, also where sbatch was given another --distribution.
    """
    return [
        "srun",
        f"--mpi={mpi}",
        f"--nodes={len(allocation.hosts)}",
        f"--ntasks={allocation.world_size}",
        f"--ntasks-per-node={allocation.ranks_per_node}",
        "--distribution=block",
        f"--cpus-per-task={allocation.cpus_per_rank}",
        "--cpu-bind=none",
        "--kill-on-bad-exit=1",
        *(["--overcommit"] if allocation.crowded else []),
    ]


def mpirun_argv(allocation: Allocation) -> list[str]:
    """Open MPI starts a daemon on each node with srun; more ranks than Slurm tasks are allowed.

    Ranks inherit the cores and GPUs of their daemon: all that the job has on the node. Of GPUs requested per
    task a step of one task per node gets those of one task, unless it says otherwise.
    """
    unset = [word for name in NOT_FOR_DAEMONS for word in ("-u", name)]
    env = ["env", *unset, f"SRUN_CPUS_PER_TASK={allocation.cpus_per_node}"]
    if allocation.gpus_by_task:
        env.append(f"SLURM_GPUS_PER_NODE={allocation.gpus_by_task}")
    placing = ["--map-by", f"ppr:{allocation.ranks_per_node}:node:oversubscribe", "--bind-to", "none"]
    return [*env, "mpirun", "-np", str(allocation.world_size), *placing]


@contextmanager
def launcher_environment(
    launcher: Launcher, allocation: Allocation, interface: str
) -> Iterator[dict[str, str]]:
    """Variables to add to the ranks' environment, for as long as the block lasts."""
    if launcher is Launcher.GLOO:
        with rendezvous(allocation, interface) as environment:
            yield environment
        return
    environment = {UNBOUND: "1", **({} if interface == "lo" else interface_environment(interface))}
    yield {name: value for name, value in environment.items() if name not in os.environ}


@contextmanager
def rendezvous(allocation: Allocation, interface: str) -> Iterator[dict[str, str]]:
    """Run Horovod's rendezvous server for ranks without MPI, on this host."""
    from horovod_owt.parallel.store import start_rendezvous  # loads Horovod

    nodes = [Node(host, allocation.ranks_per_node) for host in allocation.hosts]
    address, port, stop = start_rendezvous(nodes, ipv4_address_of(interface))
    try:
        yield rendezvous_environment(address, port)
    finally:
        stop()
