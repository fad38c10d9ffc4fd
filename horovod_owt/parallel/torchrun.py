"""Make ranks started by torchrun the ranks of a Gloo job: they exchange addresses through torchrun's store.

Each node stores its address and number of ranks; rank 0 starts Horovod's rendezvous server and stores its
address.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Protocol

from torch.distributed import rendezvous

from horovod_owt.errors import RunError
from horovod_owt.parallel.gloo import Node, rank_environment, rendezvous_environment, use_interface
from horovod_owt.parallel.interfaces import (
    interface_between,
    interface_towards,
    ipv4_address_of,
    source_address,
)
from horovod_owt.parallel.store import start_rendezvous
from horovod_owt.topology import LAUNCHERS, Launcher, Topology

RENDEZVOUS_LIMIT_S = 300  # for the slowest rank to load torch
SERVER = "horovod_owt/server"
_store = None  # kept alive: it may be the server that other ranks read from
_stop_server: Callable[[], None] | None = None  # on rank 0


class Store(Protocol):
    """The methods of torch.distributed.Store that are used; `get` waits for the key."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...


def join_torchrun(topology: Topology) -> None:
    """Set this process's environment as horovodrun would; raises RunError if not all ranks connect in time.

    Does nothing after the first call. torch keeps the keys of torchrun's restarts apart, so no stale address
    is read.
    """
    global _store
    if LAUNCHERS[Launcher.GLOO].are_in(os.environ):
        return
    master = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        _store = _torchruns_store(topology)
        variables, interface = exchange_addresses(_store, topology, os.environ)
    except (RuntimeError, TimeoutError) as error:  # DistError is the former; torch 2.0 raises the latter
        raise RunError(
            f"rank {topology.rank} on {topology.host} cannot reach the others through torchrun's store "
            f"at {master}: {str(error).splitlines()[0]}",
            wanted="all ranks started, and TCP to that address",
            fix="see torchrun's output; use a --master-addr or --rdzv-endpoint that all nodes reach",
        ) from None
    os.environ.update(variables)
    use_interface(os.environ, interface)


def _torchruns_store(topology: Topology) -> Store:
    """The store of torchrun itself, or of rank 0 on the port that torchrun chose."""
    limit = timedelta(seconds=RENDEZVOUS_LIMIT_S)
    store, _, _ = next(rendezvous("env://", topology.rank, topology.world_size, timeout=limit))
    store.set_timeout(limit)
    return store


def exchange_addresses(
    store: Store, topology: Topology, env: Mapping[str, str]
) -> tuple[dict[str, str], str]:
    """Horovod's variables for this rank, and the interface to the other nodes; waits for all nodes."""
    node, node_count = int(env["GROUP_RANK"]), int(env["GROUP_WORLD_SIZE"])
    if topology.local_rank == 0:
        mine = {"host": topology.host, "ranks": topology.local_size}
        if node > 0:
            mine["address"] = source_address(env["MASTER_ADDR"])
        store.set(f"horovod_owt/node/{node}", json.dumps(mine))
    entries = [json.loads(store.get(f"horovod_owt/node/{number}")) for number in range(node_count)]
    nodes = _unique_nodes(entries)
    # the first node may resolve its own address to loopback, so it uses its routes to the others
    others = [one["address"] for one in entries[1:]]
    interface = interface_towards(env["MASTER_ADDR"]) if node else interface_between(others)
    if topology.rank == 0:
        global _stop_server
        *server, _stop_server = start_rendezvous(nodes, ipv4_address_of(interface))
        store.set(SERVER, json.dumps(server))
    address, port = json.loads(store.get(SERVER))
    place = rank_environment(nodes, node, topology.local_rank)
    return {**place, **rendezvous_environment(address, port)}, interface


def close_server() -> None:
    """Stop rank 0's rendezvous server, which is not needed once all ranks have started Horovod."""
    if _stop_server is not None:
        _stop_server()


def _unique_nodes(entries: list[dict]) -> list[Node]:
    """The nodes with unique names, by which Horovod identifies hosts; several nodes may be on one host."""
    hosts = [one["host"] for one in entries]
    return [
        Node(host if hosts.count(host) == 1 else f"{host}-{number}", one["ranks"])
        for number, (host, one) in enumerate(zip(hosts, entries, strict=True))
    ]
