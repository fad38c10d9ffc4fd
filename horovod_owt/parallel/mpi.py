"""Make MPI yield the core while it waits, for ranks that compute on CPU cores.

By default MPI polls while it waits, and takes cores from ranks that compute. The setting is made in the rank
itself, so it applies under any launcher. Ranks on GPUs keep MPI's default.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from horovod_owt.errors import DeviceError
from horovod_owt.parallel.device import visible_devices

# CPU seconds that a rank used waiting for one that computed for 1 s on the same core, by default and with
# these: Open MPI 5.0 1.00 and 0.02, Intel MPI 2021.18 1.00 and 0.02, MPICH 5.0 1.00 and 0.25.
YIELD = {
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "I_MPI_WAIT_MODE": "1",
    "I_MPI_THREAD_YIELD": "2",  # sched_yield
    "MPIR_CVAR_ENABLE_HEAVY_YIELD": "1",  # MPICH: nanosleep; its sched_yield has no effect on Linux
}


def yield_when_idle(env: MutableMapping[str, str] = os.environ) -> None:
    """Let waiting ranks yield their core, unless the user has set it by a variable or `mpirun --mca`.

    Call it before MPI starts, which reads the environment only once.
    """
    for name, value in YIELD.items():
        env.setdefault(name, value)


def sees_gpus(env: MutableMapping[str, str] = os.environ) -> bool:
    """Whether this process has a GPU to train on, or one that it cannot use."""
    try:
        return bool(visible_devices(env))
    except DeviceError:
        return True
