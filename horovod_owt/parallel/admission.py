"""TCP servers that admit only clients that know a key, and clients that trust only such servers.

    server: {"challenge": S}
    client: {"challenge": C, "hello": {...}, "proof": HMAC-SHA256(key, ["client", S, C, hello])}
    server: {"proof": HMAC-SHA256(key, ["server", S, C, hello])}

S and C are random: neither the key nor anything that can be used again crosses the network. What follows is
neither encrypted nor signed. A server never waits for a client: the silent, the slow and those that send
anything else are dropped, and their number and what is kept of each are bounded.
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

HELLO_BYTES = 1000  # of a line of the handshake
PROVE_S = 5.0  # for a client to prove the key, from accept on
TRUST_S = 15.0  # for a server to do the same, longer: it may be busy
MOST_UNPROVEN = 128  # connections at a time, per server that expects no more
ACCEPTS = 32  # new connections between two looks at the others
BACKLOG = 1024  # connections that the kernel keeps for us
RETRY_S = 0.1


class Place(NamedTuple):
    """An address and port that a server listens on."""

    ip: str
    port: int


class Admitted(NamedTuple):
    """A client that has proven the key: what it says of itself, and its connection."""

    hello: dict[str, Any]
    connection: socket.socket


@dataclass(eq=False)
class Unproven:
    """A connection of somebody who has yet to prove the key."""

    connection: socket.socket
    ip: str
    challenge: str = field(default_factory=lambda: secrets.token_hex(16))
    since: float = field(default_factory=monotonic)
    lines: Lines = field(default_factory=lambda: Lines(HELLO_BYTES))


def new_key() -> str:
    return secrets.token_hex(16)


def proof(key: str, role: str, challenges: Sequence[str], hello: dict[str, Any]) -> str:
    message = json.dumps([role, *challenges, hello], sort_keys=True).encode()
    return hmac.new(key.encode(), message, "sha256").hexdigest()


def is_proof(shown: Any, key: str, role: str, challenges: Sequence[str], hello: dict[str, Any]) -> bool:
    wanted = proof(key, role, challenges, hello).encode()
    return isinstance(shown, str) and hmac.compare_digest(shown.encode(errors="replace"), wanted)


class Listener:
    """Listens on `ips`; for one thread. `fileno` becomes readable when `admit` has something to do.

    `clients` may connect at the same moment: a bound below their number would drop those that answer late,
    they would connect again, and with thousands of ranks few would ever get through.
    """

    def __init__(self, ips: Sequence[str], key: str, clients: int = 0) -> None:
        self.key, self._most_unproven = key, max(MOST_UNPROVEN, clients)
        self._selector = selectors.DefaultSelector()
        self._listeners: list[socket.socket] = []
        self._unproven: dict[Unproven, None] = {}  # oldest first
        try:
            self._listeners.extend(listen(ip) for ip in ips)
        except OSError:
            self.close()
            raise
        for listener in self._listeners:
            self._selector.register(listener, selectors.EVENT_READ)
        self.places = tuple(Place(*listener.getsockname()[:2]) for listener in self._listeners)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        return self._selector.fileno()

    def descriptors(self) -> set[int]:
        """Of the connections that are not admitted yet."""
        return {one.connection.fileno() for one in self._unproven}

    def admit(self, wait_s: float = 0.0) -> list[Admitted]:
        """The clients that have proven the key since the last call; waits up to `wait_s` for an event."""
        admitted = []
        for key, _ in self._selector.select(wait_s):
            if key.data is None:
                self._accept(key.fileobj)
            elif key.data in self._unproven and (hello := self._judge(key.data)) is not None:
                admitted.append(Admitted(hello, key.data.connection))
        while self._unproven and monotonic() > (oldest := next(iter(self._unproven))).since + PROVE_S:
            self._drop(oldest)
        return admitted

    def close(self) -> None:
        """Stop listening and drop those who have not proven the key."""
        for one in self._unproven:
            one.connection.close()
        self._unproven.clear()
        for listener in self._listeners:
            listener.close()
        self._selector.close()

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPTS):
            try:
                connection, (ip, *_) = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # gone already, or no descriptor is left
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._make_room()
                return
            connection.setblocking(False)
            one = Unproven(connection, ip)
            if len(self._unproven) >= self._most_unproven:
                self._make_room()
            self._unproven[one] = None
            self._selector.register(connection, selectors.EVENT_READ, one)
            try:
                connection.sendall(json_line({"challenge": one.challenge}))
            except OSError:
                self._drop(one)

    def _make_room(self) -> None:
        """Drop the oldest connection of the address that has most of them: a flood displaces itself."""
        if self._unproven:
            ((most, _),) = Counter(one.ip for one in self._unproven).most_common(1)
            self._drop(next(one for one in self._unproven if one.ip == most))

    def _judge(self, one: Unproven) -> dict[str, Any] | None:
        """The client's hello, once it has proven the key; whoever can't is dropped."""
        try:
            arrived = one.connection.recv(HELLO_BYTES)
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

    def _forget(self, one: Unproven) -> None:
        del self._unproven[one]
        self._selector.unregister(one.connection)

    def _drop(self, one: Unproven) -> None:
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
    places: Sequence[Place], key: str, hello: dict[str, Any], limit_s: float = TRUST_S
) -> socket.socket:
    """A connection to the server that listens on one of `places` and knows `key`.

    Raises OSError if none of them does so within `limit_s`, at once if all refuse.
    """
    deadline = monotonic() + limit_s
    while True:
        errors = []
        for place in places:
            try:
                return _connect(Place(*place), key, hello, min(deadline, monotonic() + limit_s / len(places)))
            except OSError as error:
                errors.append(error)
        if monotonic() + RETRY_S > deadline or all(isinstance(e, ConnectionRefusedError) for e in errors):
            where = ", ".join(f"{place[0]} port {place[1]}" for place in places)
            raise OSError(f"no answer at {where}: {errors[-1] if errors else 'no address'}")
        sleep(RETRY_S)


def _connect(place: Place, key: str, hello: dict[str, Any], deadline: float) -> socket.socket:
    connection = socket.create_connection(place, timeout=min(PROVE_S, _left(deadline)))
    try:
        own = secrets.token_hex(16)
        challenges = (_line(connection, deadline)["challenge"], own)
        answer = {"challenge": own, "hello": hello, "proof": proof(key, "client", challenges, hello)}
        connection.sendall(json_line(answer))
        if is_proof(_line(connection, deadline)["proof"], key, "server", challenges, hello):
            return connection
        raise OSError(f"{place.ip} port {place.port} is another server")
    except (ValueError, KeyError, TypeError):
        connection.close()
        raise OSError(f"{place.ip} port {place.port} is another server") from None
    except OSError:
        connection.close()
        raise


def _line(connection: socket.socket, deadline: float) -> Any:
    """The next message, and no byte of what follows; OSError if it is late or too long."""
    line = bytearray()
    while not line.endswith(b"\n"):
        connection.settimeout(_left(deadline))
        arrived = connection.recv(1)
        if not arrived or len(line) == HELLO_BYTES:
            raise ConnectionResetError("connection closed by the other end")
        line += arrived
    return parsed(bytes(line))


def _left(deadline: float) -> float:
    """Seconds left, as a timeout: a socket takes 0 for "do not wait"."""
    return max(0.01, deadline - monotonic())
