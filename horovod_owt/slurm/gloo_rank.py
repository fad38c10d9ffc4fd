"""Becomes a rank of a job without MPI: tells Horovod's Gloo what srun told this task.

srun python -m horovod_owt.slurm.gloo_rank owt train DATA
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from horovod_owt.parallel.interfaces import interface_towards
from horovod_owt.topology import expand_counts


def horovod_environment(env: Mapping[str, str]) -> dict[str, str]:
    """Horovod's words for this task's place; node, not host: its number over all is Horovod's `cross` one."""
    node = int(env["SLURM_NODEID"])
    local_sizes = expand_counts(env["SLURM_STEP_TASKS_PER_NODE"])
    local_rank = int(env["SLURM_LOCALID"])
    with_such_a_rank = [index for index, size in enumerate(local_sizes) if size > local_rank]
    return {
        "HOROVOD_RANK": env["SLURM_PROCID"],
        "HOROVOD_SIZE": env["SLURM_NTASKS"],
        "HOROVOD_LOCAL_RANK": str(local_rank),
        "HOROVOD_LOCAL_SIZE": str(local_sizes[node]),
        "HOROVOD_CROSS_RANK": str(with_such_a_rank.index(node)),
        "HOROVOD_CROSS_SIZE": str(len(with_such_a_rank)),
        "HOROVOD_HOSTNAME": env["SLURMD_NODENAME"],
    }


def main() -> None:
    """Each host looks for its own interface: names differ between hosts."""
    interface = interface_towards(os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"])
    os.environ.update(horovod_environment(os.environ))
    for name in ("HOROVOD_GLOO_IFACE", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, interface)
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
