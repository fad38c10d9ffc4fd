"""Horovod's environment variables for ranks over Gloo that horovodrun does not start."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from horovod_owt.parallel.interfaces import nccl_interface

ADDRESS = "HOROVOD_GLOO_RENDEZVOUS_ADDR"


@dataclass(frozen=True)
class Node:
    """A host of a job; ranks are numbered host by host."""

    host: str  # unique in the job
    ranks: int


def rank_environment(nodes: Sequence[Node], node: int, local_rank: int) -> dict[str, str]:
    """Horovod's variables for the `local_rank`-th rank of the `node`-th node.

    The CROSS variables count the nodes that have this local rank.
    """
    with_local_rank = [index for index, one in enumerate(nodes) if one.ranks > local_rank]
    return {
        "HOROVOD_RANK": str(sum(one.ranks for one in nodes[:node]) + local_rank),
        "HOROVOD_SIZE": str(sum(one.ranks for one in nodes)),
        "HOROVOD_LOCAL_RANK": str(local_rank),
        "HOROVOD_LOCAL_SIZE": str(nodes[node].ranks),
        "HOROVOD_CROSS_RANK": str(with_local_rank.index(node)),
        "HOROVOD_CROSS_SIZE": str(len(with_local_rank)),
        "HOROVOD_HOSTNAME": nodes[node].host,
    }


def rendezvous_environment(address: str, port: int) -> dict[str, str]:
    """Horovod's variables for the address that `store.start_rendezvous` returns."""
    return {
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        ADDRESS: address,
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
    }


def rendezvous_host(env: Mapping[str, str]) -> str:
    """The IP address or host name in HOROVOD_GLOO_RENDEZVOUS_ADDR; KeyError if that is not set."""
    return env[ADDRESS].partition("/")[0].partition(":")[0]


def use_interface(env: MutableMapping[str, str], interface: str) -> None:
    """Set the interface for Gloo and NCCL, unless the user has set one."""
    for name, value in {"HOROVOD_GLOO_IFACE": interface, **nccl_interface(interface)}.items():
        env.setdefault(name, value)
