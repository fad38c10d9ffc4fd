"""Horovod over Gloo without horovodrun: the variables of a rank."""

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


def place_environment(nodes: Sequence[Node], node: int, local_rank: int) -> dict[str, str]:
    """Horovod's variables for the `local_rank`-th rank of the `node`-th node.

    The CROSS variables count the nodes that have a rank with this local rank.
    """
    with_such_a_rank = [index for index, one in enumerate(nodes) if one.ranks > local_rank]
    return {
        "HOROVOD_RANK": str(sum(one.ranks for one in nodes[:node]) + local_rank),
        "HOROVOD_SIZE": str(sum(one.ranks for one in nodes)),
        "HOROVOD_LOCAL_RANK": str(local_rank),
        "HOROVOD_LOCAL_SIZE": str(nodes[node].ranks),
        "HOROVOD_CROSS_RANK": str(with_such_a_rank.index(node)),
        "HOROVOD_CROSS_SIZE": str(len(with_such_a_rank)),
        "HOROVOD_HOSTNAME": nodes[node].host,
    }


def store_environment(address: str, port: int) -> dict[str, str]:
    """Horovod's variables for the address of the rendezvous server, as `store.start_store` returns it."""
    return {
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        ADDRESS: address,
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
    }


def store_host(env: Mapping[str, str]) -> str:
    """The IP address or host name in HOROVOD_GLOO_RENDEZVOUS_ADDR; KeyError if that is not set."""
    return env[ADDRESS].partition("/")[0].partition(":")[0]


def use_interface(env: MutableMapping[str, str], interface: str) -> None:
    """Set the interface of Gloo and NCCL, unless the user has."""
    for name, value in {"HOROVOD_GLOO_IFACE": interface, **nccl_interface(interface)}.items():
        env.setdefault(name, value)
