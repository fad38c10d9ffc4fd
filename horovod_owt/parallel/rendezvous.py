"""Authenticated TCP connections of all ranks to rank 0, independent of Horovod."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from horovod_owt.parallel.admission import Endpoint, Listener, connect, new_key
from horovod_owt.parallel.interfaces import listening_addresses


@dataclass(frozen=True)
class Address:
    """Where rank 0 listens, and the key that it expects: a secret of this job's ranks."""

    key: str
    endpoints: tuple[Endpoint, ...]
    host: str


class Rendezvous:
    """Rank 0's listener; its owner closes it once all ranks are connected.

    It listens on loopback if all ranks are on this host, else on the job's interface if that is known.
    """

    def __init__(self, host: str, ranks: int, *, one_host: bool, env: Mapping[str, str] = os.environ) -> None:
        self.listener = Listener(listening_addresses(env, one_host=one_host), new_key(), clients=ranks)
        self.address = Address(self.listener.key, self.listener.endpoints, host)
        self._ranks = ranks

    def admit(self, wait_s: float = 0.0) -> Iterator[tuple[int, str, socket.socket]]:
        """Rank, host and connection of the ranks that have connected since the last call."""
        for hello, connection in self.listener.admit(wait_s):
            rank, host = hello.get("rank"), hello.get("host")
            if type(rank) is int and 0 < rank < self._ranks and isinstance(host, str):
                yield rank, host, connection
            else:
                connection.close()

    def close(self) -> None:
        self.listener.close()


def connect_to_root(address: Address, rank: int, host: str) -> socket.socket:
    """A mutually authenticated connection to rank 0; raises OSError if no address answers."""
    try:
        return connect(address.endpoints, address.key, {"rank": rank, "host": host})
    except OSError as error:
        raise OSError(f"rank 0 does not answer: {error}") from None


def abort_connections(*, keep: set[int]) -> None:
    """Shut down this process's TCP connections, except those with these descriptors.

    This makes a pending Gloo collective fail as if its peer had died.
    """
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        try:
            if descriptor in keep or not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as connection:
                tcp = connection.family in (socket.AF_INET, socket.AF_INET6)
                if tcp and not connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # closed meanwhile
            continue
