"""How ranks are started inside a job: by which launcher, with which argv."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from horovod_owt.errors import ConfigError
from horovod_owt.parallel.interfaces import address_of, interface_between, interface_environment
from horovod_owt.slurm.allocation import Allocation
from horovod_owt.topology import UNBOUND


def choose_launcher(asked: str, *, srun_mpi: str, mpirun: str | None, horovod_mpi: bool) -> tuple[str, str]:
    """The launcher, and why; `srun_mpi` is what `srun --mpi=list` says.

    Raises ConfigError where the one asked for cannot be had.
    """
    pmix = bool(re.search(r"\bpmix", srun_mpi))
    lacks = {
        "pmix": "" if pmix and horovod_mpi else "srun has no pmix" if not pmix else "Horovod has no MPI",
        "mpirun": ""
        if mpirun and horovod_mpi
        else "no mpirun on PATH"
        if not mpirun
        else "Horovod has no MPI",
        "gloo": "",
    }
    if asked != "auto":
        if lacks[asked]:
            raise ConfigError(f"--launcher {asked}, but {lacks[asked]}", fix="--launcher auto")
        return asked, "asked for"
    chosen = next(name for name, lack in lacks.items() if not lack)
    return chosen, ", ".join(lack for lack in lacks.values() if lack) or "srun has pmix, Horovod has MPI"


def horovod_has_mpi() -> bool:
    """Whether the installed Horovod can use MPI, without loading torch: what its library is linked with."""
    spec = find_spec("horovod")
    libraries = Path(spec.origin).parent.glob("torch/mpi_lib*.so") if spec else []
    return any(b"libmpi.so" in library.read_bytes() for library in libraries)


def ranks_argv(
    launcher: str,
    allocation: Allocation,
    command: Sequence[str],
    *,
    container_image: str = "",
    apptainer: str = "",
) -> list[str]:
    """The command that starts `command` on every rank, in a container if there is one.

    Without one, programs go by their full path: mpirun's daemons put its own folder first on PATH.
    """
    bare = not (container_image or apptainer)
    if bare:
        command = [shutil.which(command[0]) or command[0], *command[1:]]
    if launcher == "gloo":
        command = [sys.executable if bare else "python", "-m", "horovod_owt.slurm.gloo_rank", *command]
    if apptainer:
        command = ["apptainer", "exec", "--nv", apptainer, *command]
    if launcher == "mpirun":
        return [*mpirun_argv(allocation), *command]
    image = [f"--container-image={container_image}"] if container_image else []
    return [*srun_argv(allocation, mpi="pmix" if launcher == "pmix" else "none"), *image, *command]


def srun_argv(allocation: Allocation, *, mpi: str) -> list[str]:
    """Ranks share out their node's cores among themselves, as under every launcher: srun binds none.

    Since 22.05 a step gets no more cores than it asks for, whatever sbatch was told.
    """
    return [
        "srun",
        f"--mpi={mpi}",
        f"--nodes={len(allocation.hosts)}",
        f"--ntasks={allocation.world_size}",
        f"--ntasks-per-node={allocation.ranks_per_node}",
        f"--cpus-per-task={allocation.cpus_per_rank}",
        "--cpu-bind=none",
        "--kill-on-bad-exit=1",
        *(["--overcommit"] if allocation.crowded else []),
    ]


def mpirun_argv(allocation: Allocation) -> list[str]:
    """Open MPI starts its daemons by srun; more ranks than Slurm has counted tasks are no mistake here."""
    placing = ["--map-by", f"ppr:{allocation.ranks_per_node}:node:oversubscribe", "--bind-to", "none"]
    return ["mpirun", "-np", str(allocation.world_size), *placing]


@contextmanager
def launcher_environment(launcher: str, allocation: Allocation) -> Iterator[dict[str, str]]:
    """What the ranks' environment needs beside the job's own, for as long as the block lasts."""
    if launcher == "gloo":
        with rendezvous(allocation) as environment:
            yield environment
        return
    interface = interface_between(list(allocation.hosts))
    environment = {UNBOUND: "1", **({} if interface == "lo" else interface_environment(interface))}
    if launcher == "mpirun":
        # for the srun below mpirun, which starts a daemon on each node: ranks inherit its cores
        environment["SRUN_CPUS_PER_TASK"] = str(allocation.cpus_per_node)
    elif allocation.crowded:
        # Whoever waits in Open MPI spins; mpirun sees by itself that ranks outnumber CPUs, srun does not say.
        environment["OMPI_MCA_mpi_yield_when_idle"] = "1"
    yield {name: value for name, value in environment.items() if name not in os.environ}


@contextmanager
def rendezvous(allocation: Allocation) -> Iterator[dict[str, str]]:
    """Horovod's own meeting point for ranks without MPI, on this host."""
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
    from horovod.runner.http.http_server import RendezvousServer

    slots = ",".join(f"{host}:{allocation.ranks_per_node}" for host in allocation.hosts)
    server = RendezvousServer()
    port = server.start()
    try:
        server.init(get_host_assignments(parse_hosts(slots), allocation.world_size))
        yield {
            "HOROVOD_CONTROLLER": "gloo",
            "HOROVOD_CPU_OPERATIONS": "gloo",
            "HOROVOD_GLOO_RENDEZVOUS_ADDR": address_of(interface_between(list(allocation.hosts))),
            "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
        }
    finally:
        server.stop()
