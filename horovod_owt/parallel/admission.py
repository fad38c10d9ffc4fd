"""Mutual authentication over TCP: client and server prove to each other that they know a key.

    server: {"challenge": S}
    client: {"challenge": C, "hello": {...}, "proof": HMAC-SHA256(key, ["client", S, C, hello])}
    server: {"proof": HMAC-SHA256(key, ["server", S, C, hello])}

S and C are random, so neither the key nor anything that could be replayed crosses the network. The messages
that follow are neither encrypted nor signed. A server never blocks on a client: it drops clients that are
silent, slow or send anything else, and limits their number and the bytes that it buffers for each.
"""

from __future__ import annotations

import errno
import hmac
import json
import secrets
import selectors
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic, sleep
from typing import Any, NamedTuple

from horovod_owt.parallel.lines import Lines, json_line, parsed

MAX_HELLO_BYTES = 1000  # of a line of the handshake
PROOF_LIMIT_S = 5.0  # for a client to prove the key after it was accepted
CONNECT_LIMIT_S = 15.0  # for a server to prove the key; longer, since it may be busy
MAX_PENDING = 128  # unauthenticated connections of a server, unless it expects more clients
MAX_ACCEPTS = 32  # new connections before the others are served again
BACKLOG = 1024  # connections that the kernel queues for a listener
RETRY_S = 0.1


class Endpoint(NamedTuple):
    """An address and port that a server listens on."""

    ip: str
    port: int


class Admitted(NamedTuple):
    """A client that has proven the key: its hello message and its connection."""

    hello: dict[str, Any]
    connection: socket.socket


@dataclass(eq=False)
class PendingClient:
    """A connection whose client has not yet proven the key."""

    connection: socket.socket
    ip: str
    challenge: str = field(default_factory=lambda: secrets.token_hex(16))
    since: float = field(default_factory=monotonic)
    lines: Lines = field(default_factory=lambda: Lines(MAX_HELLO_BYTES))


def new_key() -> str:
    return secrets.token_hex(16)


def proof(key: str, role: str, challenges: Sequence[str], hello: dict[str, Any]) -> str:
    message = json.dumps([role, *challenges, hello], sort_keys=True).encode()
    return hmac.new(key.encode(), message, "sha256").hexdigest()


def is_proof(shown: Any, key: str, role: str, challenges: Sequence[str], hello: dict[str, Any]) -> bool:
    wanted = proof(key, role, challenges, hello).encode()
    return isinstance(shown, str) and hmac.compare_digest(shown.encode(errors="replace"), wanted)


class Listener:
    """Listens on `ips`. Not thread-safe. `fileno` becomes readable when `admit` has something to do.

    Up to `clients` may connect at the same moment: with a lower limit, late ones would be dropped and
    reconnect, and with thousands of ranks few would ever get through.
    """

    def __init__(self, ips: Sequence[str], key: str, clients: int = 0) -> None:
        self.key, self._max_pending = key, max(MAX_PENDING, clients)
        self._selector = selectors.DefaultSelector()
        self._listeners: list[socket.socket] = []
        self._pending: dict[PendingClient, None] = {}  # oldest first
        try:
            self._listeners.extend(listen(ip) for ip in ips)
        except OSError:
            self.close()
            raise
        for listener in self._listeners:
            self._selector.register(listener, selectors.EVENT_READ)
        self.endpoints = tuple(Endpoint(*listener.getsockname()[:2]) for listener in self._listeners)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        return self._selector.fileno()

    def descriptors(self) -> set[int]:
        """File descriptors of the connections that are not admitted yet."""
        return {one.connection.fileno() for one in self._pending}

    def admit(self, wait_s: float = 0.0) -> list[Admitted]:
        """The clients that have proven the key since the last call; waits up to `wait_s` for an event."""
        admitted = []
        for key, _ in self._selector.select(wait_s):
            if key.data is None:
                self._accept(key.fileobj)
            elif key.data in self._pending and (hello := self._authenticate(key.data)) is not None:
                admitted.append(Admitted(hello, key.data.connection))
        while self._pending and monotonic() > (oldest := next(iter(self._pending))).since + PROOF_LIMIT_S:
            self._drop(oldest)
        return admitted

    def close(self) -> None:
        """Stop listening, and drop clients that have not proven the key."""
        for one in self._pending:
            one.connection.close()
        self._pending.clear()
        for listener in self._listeners:
            listener.close()
        self._selector.close()

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(MAX_ACCEPTS):
            try:
                connection, (ip, *_) = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # the client is gone, or no descriptor is left
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._drop_one()
                return
            connection.setblocking(False)
            one = PendingClient(connection, ip)
            if len(self._pending) >= self._max_pending:
                self._drop_one()
            self._pending[one] = None
            self._selector.register(connection, selectors.EVENT_READ, one)
            try:
                connection.sendall(json_line({"challenge": one.challenge}))
            except OSError:
                self._drop(one)

    def _drop_one(self) -> None:
        """Drop the oldest connection of the address that has the most, so that a flood displaces itself."""
        if self._pending:
            ((busiest, _),) = Counter(one.ip for one in self._pending).most_common(1)
            self._drop(next(one for one in self._pending if one.ip == busiest))

    def _authenticate(self, one: PendingClient) -> dict[str, Any] | None:
        """The client's hello, once it has proven the key; a client that fails is dropped."""
        try:
            arrived = one.connection.recv(MAX_HELLO_BYTES)
            messages = one.lines.feed(arrived)
            if arrived and not messages:
                return None
            (answer,) = messages
            if one.lines:
                raise ValueError("more than an answer")
            hello, challenges = answer["hello"], (one.challenge, answer["challenge"])
            if isinstance(hello, dict) and is_proof(answer["proof"], self.key, "client", challenges, hello):
                one.connection.sendall(json_line({"proof": proof(self.key, "server", challenges, hello)}))
                self._forget(one)
                return hello
        except BlockingIOError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            pass
        self._drop(one)
        return None

    def _forget(self, one: PendingClient) -> None:
        del self._pending[one]
        self._selector.unregister(one.connection)

    def _drop(self, one: PendingClient) -> None:
        self._forget(one)
        one.connection.close()


def listen(ip: str) -> socket.socket:
    """A listening socket on a free port of this address, IPv4 or IPv6."""
    listener = socket.create_server((ip, 0), family=family_of(ip), backlog=BACKLOG)
    listener.setblocking(False)
    return listener


def family_of(ip: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in ip else socket.AF_INET


def connect(
    endpoints: Sequence[Endpoint], key: str, hello: dict[str, Any], limit_s: float = CONNECT_LIMIT_S
) -> socket.socket:
    """A connection to the server that listens on one of `endpoints` and knows `key`.

    Raises OSError if none answers within `limit_s`, or at once if all refuse.
    """
    deadline = monotonic() + limit_s
    while True:
        errors = []
        for endpoint in endpoints:
            try:
                return _connect(
                    Endpoint(*endpoint), key, hello, min(deadline, monotonic() + limit_s / len(endpoints))
                )
            except OSError as error:
                errors.append(error)
        if monotonic() + RETRY_S > deadline or all(isinstance(e, ConnectionRefusedError) for e in errors):
            where = ", ".join(f"{endpoint[0]} port {endpoint[1]}" for endpoint in endpoints)
            raise OSError(f"no answer at {where}: {errors[-1] if errors else 'no address'}")
        sleep(RETRY_S)


def _connect(endpoint: Endpoint, key: str, hello: dict[str, Any], deadline: float) -> socket.socket:
    connection = socket.create_connection(endpoint, timeout=min(PROOF_LIMIT_S, _left(deadline)))
    try:
        own = secrets.token_hex(16)
        challenges = (_line(connection, deadline)["challenge"], own)
        answer = {"challenge": own, "hello": hello, "proof": proof(key, "client", challenges, hello)}
        connection.sendall(json_line(answer))
        if is_proof(_line(connection, deadline)["proof"], key, "server", challenges, hello):
            return connection
        raise OSError(f"{endpoint.ip} port {endpoint.port} is another server")
    except (ValueError, KeyError, TypeError):
        connection.close()
        raise OSError(f"{endpoint.ip} port {endpoint.port} is another server") from None
    except OSError:
        connection.close()
        raise


def _line(connection: socket.socket, deadline: float) -> Any:
    """The next message, without reading beyond it; OSError if it is late or too long."""
    line = bytearray()
    while not line.endswith(b"\n"):
        connection.settimeout(_left(deadline))
        arrived = connection.recv(1)
        if not arrived or len(line) == MAX_HELLO_BYTES:
            raise ConnectionResetError("connection closed by the other end")
        line += arrived
    return parsed(bytes(line))


def _left(deadline: float) -> float:
    """Seconds left, as a timeout; never 0, which would make the socket non-blocking."""
    return max(0.01, deadline - monotonic())
