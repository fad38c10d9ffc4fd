"""Ranks that share work and need no Horovod: MPI alone."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from horovod_owt.errors import ConfigError
from horovod_owt.topology import Topology


def gather_json(value: Any, topology: Topology) -> list[Any] | None:
    """Every rank's `value` on rank 0, in rank order; None on the others. Every rank must call it."""
    if topology.world_size == 1:
        return [value]
    from mpi4py import MPI

    everyone = MPI.COMM_WORLD
    own = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = np.zeros(everyone.size, np.int32)
    everyone.Allgather(np.array([len(own)], np.int32), lengths)
    if everyone.rank:
        everyone.Gatherv(own, None)
        return None
    texts = np.empty(lengths.sum(), np.uint8)
    everyone.Gatherv(own, [texts, lengths])
    ends = np.cumsum(lengths)
    return [json.loads(part.tobytes()) for part in np.split(texts, ends[:-1])]


def broadcast_number(value: int, topology: Topology) -> int:
    """Rank 0's `value` on every rank."""
    if topology.world_size == 1:
        return value
    from mpi4py import MPI

    number = np.array([value], np.int64)
    MPI.COMM_WORLD.Bcast(number)
    return int(number[0])


def check_started_by_mpi(topology: Topology, command: str) -> None:
    """ConfigError for ranks that MPI does not know of."""
    if topology.launcher == "horovodrun":
        raise ConfigError(
            f"{command} under horovodrun",
            wanted="one process, or mpirun",
            fix=f"mpirun -np {topology.world_size} --bind-to none {command}",
        ).on_every_rank()
