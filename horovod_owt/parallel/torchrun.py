"""Ranks that torchrun started: they meet in torchrun's store, then become ranks of a Gloo job of Horovod.

Each node says there how the others reach it and how many ranks it has; rank 0 starts Horovod's rendezvous
server and leaves its address.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Protocol

from torch.distributed import rendezvous

from horovod_owt.errors import RunError
from horovod_owt.parallel.gloo import Node, place_environment, start_store, store_environment, use_interface
from horovod_owt.parallel.interfaces import address_of, interface_between, interface_towards, source_address
from horovod_owt.topology import LAUNCHERS, Launcher, Topology

MEETING_LIMIT_S = 300  # until the slowest rank has loaded torch
SERVER = "horovod_owt/server"
_store = None  # to be kept: it may be a server that the other ranks still read from


class Store(Protocol):
    """What is needed of a torch.distributed.Store: `get` waits for the key."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...


def join_torchrun(topology: Topology) -> None:
    """Set this process's environment as horovodrun would have; raises RunError if the ranks do not meet.

    Once a process. torch keeps the keys of each of torchrun's restarts apart, so no old address is found.
    """
    global _store
    if LAUNCHERS[Launcher.GLOO].are_in(os.environ):
        return
    master = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        _store = _torchruns_store(topology)
        variables, interface = meet(_store, topology, os.environ)
    except RuntimeError as error:  # torch's DistError among them, which 2.0 does not have
        raise RunError(
            f"rank {topology.rank} on {topology.host} does not meet the others by torchrun's store "
            f"at {master}: {str(error).splitlines()[0]}",
            wanted="all ranks started, and TCP to that address",
            fix="see what torchrun said of the others; --master-addr or --rdzv-endpoint that all nodes reach",
        ) from None
    os.environ.update(variables)
    use_interface(os.environ, interface)


def _torchruns_store(topology: Topology) -> Store:
    """Kept by torchrun itself, or by rank 0 on the port that torchrun chose: torch knows."""
    limit = timedelta(seconds=MEETING_LIMIT_S)
    store, _, _ = next(rendezvous("env://", topology.rank, topology.world_size, timeout=limit))
    store.set_timeout(limit)
    return store


def meet(store: Store, topology: Topology, env: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """Horovod's variables for this rank, and the interface that leads to the others; waits for all nodes."""
    node, node_count = int(env["GROUP_RANK"]), int(env["GROUP_WORLD_SIZE"])
    if topology.local_rank == 0:
        mine = {"host": topology.host, "ranks": topology.local_size}
        if node > 0:
            mine["address"] = source_address(env["MASTER_ADDR"])
        store.set(f"horovod_owt/node/{node}", json.dumps(mine))
    told = [json.loads(store.get(f"horovod_owt/node/{number}")) for number in range(node_count)]
    nodes = _unique_nodes(told)
    # the first node's own address may be a loopback one to itself: it looks towards the others
    others = [one["address"] for one in told[1:]]
    interface = interface_towards(env["MASTER_ADDR"]) if node else interface_between(others)
    if topology.rank == 0:
        port, _ = start_store(nodes)
        store.set(SERVER, json.dumps([address_of(interface), port]))
    address, port = json.loads(store.get(SERVER))
    place = place_environment(nodes, node, topology.local_rank)
    return {**place, **store_environment(address, port)}, interface


def _unique_nodes(told: list[dict]) -> list[Node]:
    """Two nodes may be on one host, or in containers of one name; Horovod tells hosts by their names."""
    hosts = [one["host"] for one in told]
    return [
        Node(host if hosts.count(host) == 1 else f"{host}-{number}", one["ranks"])
        for number, (host, one) in enumerate(zip(hosts, told, strict=True))
    ]
