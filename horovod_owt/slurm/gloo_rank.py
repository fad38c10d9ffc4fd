"""Turn an srun task into a rank of a job without MPI: set Horovod's Gloo variables from Slurm's.

srun owt job rank owt train DATA
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from horovod_owt.errors import ConfigError
from horovod_owt.parallel.gloo import Node, rank_environment, rendezvous_host, use_interface
from horovod_owt.parallel.interfaces import interface_towards
from horovod_owt.topology import expand_counts


def horovod_environment(env: Mapping[str, str]) -> dict[str, str]:
    """Horovod's variables for this task; the names of other nodes are unknown, and not needed."""
    node = int(env["SLURM_NODEID"])
    ranks = expand_counts(env["SLURM_STEP_TASKS_PER_NODE"])
    nodes = [Node(env["SLURMD_NODENAME"] if number == node else "", n) for number, n in enumerate(ranks)]
    return rank_environment(nodes, node, int(env["SLURM_LOCALID"]))


def become_rank(command: Sequence[str]) -> None:
    """Exec `command`. Each host finds its own interface, because names differ between hosts."""
    try:
        interface = interface_towards(rendezvous_host(os.environ))
        os.environ.update(horovod_environment(os.environ))
    except KeyError as error:
        raise ConfigError(
            f"no {error.args[0]} in the environment", wanted="a task of `owt job submit`"
        ) from None
    use_interface(os.environ, interface)
    os.execvp(command[0], command)
