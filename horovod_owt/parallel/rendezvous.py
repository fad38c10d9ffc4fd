"""TCP connections to rank 0, independent of Horovod; a token admits only the ranks of its job."""

from __future__ import annotations

import json
import os
import secrets
import socket
import stat
from dataclasses import dataclass
from typing import Any

from horovod_owt.parallel.interfaces import own_addresses

CONNECT_S = 5.0  # to try one address, and to receive a hello


@dataclass(frozen=True)
class Address:
    """Where rank 0 listens, and the token it expects; only ranks of this job may know it."""

    token: str
    ips: tuple[str, ...]
    port: int
    host: str


class Rendezvous:
    """Rank 0's listening socket; its owner closes it."""

    def __init__(self, host: str, ranks: int) -> None:
        self.listener = socket.create_server(("", 0), backlog=ranks)
        port = self.listener.getsockname()[1]
        self.address = Address(secrets.token_hex(16), tuple(own_addresses()), port, host)

    def accept(self) -> tuple[int, str, socket.socket] | None:
        """The next peer: its rank, host and connection. None for one without the token."""
        connection, _ = self.listener.accept()
        connection.settimeout(CONNECT_S)
        try:
            hello = json.loads(connection.makefile("rb").readline(1000))
            if secrets.compare_digest(hello["token"], self.address.token):
                connection.sendall(b"\n")
                return int(hello["rank"]), str(hello["host"]), connection
        except (OSError, ValueError, KeyError, TypeError):
            pass
        connection.close()
        return None

    def close(self) -> None:
        self.listener.close()


def connect(address: Address, rank: int, host: str) -> socket.socket:
    """An authenticated connection to rank 0; raises OSError if no address answers."""
    local = host == address.host
    for ip in (ip for ip in address.ips if local or not ip.startswith("127.")):
        try:
            connection = socket.create_connection((ip, address.port), timeout=CONNECT_S)
            connection.sendall(json_line({"token": address.token, "rank": rank, "host": host}))
            if connection.recv(1) == b"\n":
                return connection
            connection.close()  # another host may have the same address, such as a bridge's
        except OSError:
            continue
    where = ", ".join(address.ips)
    raise OSError(f"rank 0 does not answer at {where}, port {address.port}")


def json_line(message: dict[str, Any]) -> bytes:
    """A message on the wire: one JSON object and a newline."""
    return json.dumps(message).encode() + b"\n"


def abort_connections(*, keep: set[int]) -> None:
    """Shut down this process's TCP connections, except those with these descriptors.

    A collective that this rank waits in then fails as if its peer had died.
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
