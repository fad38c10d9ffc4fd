"""Measurements over plain TCP between ranks: latency, bandwidth, clock offset.

`key` is a secret of the job's ranks; a server serves no other clients.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import monotonic, perf_counter, time

from horovod_owt.parallel.admission import Endpoint, Listener, connect

PINGS = 40
STREAM_S = 0.3  # duration of the bandwidth test in each direction
BLOCK = bytes(1 << 20)
LIMIT_S = 8.0  # timeout to connect, and of each send and receive
PING, UP, DOWN, RING = "ping", "up", "down", "ring"  # purposes of a connection
STOP_S = 0.2  # until a server that is no longer needed stops
CLOCK = struct.Struct("!d")
RATE = struct.Struct("!d")


@dataclass(frozen=True)
class Pair:
    """Latency and bandwidth from one host to another."""

    latency_s: float  # half the round trip
    up_bytes_per_s: float  # to the other host
    down_bytes_per_s: float


@contextmanager
def answering(address: str, key: str) -> Iterator[int]:
    """Serve `measure` on a port at `address` during the block; yields the port."""
    stop = threading.Event()
    with Listener([address], key) as listener:
        server = threading.Thread(target=_serve, args=(listener, stop), daemon=True, name="wire")
        server.start()
        try:
            yield listener.endpoints[0].port
        finally:
            stop.set()
            server.join(LIMIT_S)


def measure(address: str, port: int, key: str) -> Pair:
    """Measure latency, then bandwidth to and from the other host; raises OSError."""
    latency_s, _ = ping(address, port, key)
    with _connect(address, port, key, UP) as connection:
        _send_for(connection, STREAM_S)
        (up,) = RATE.unpack(_exactly(connection, RATE.size))
    with _connect(address, port, key, DOWN) as connection:
        down = _receive_rate(connection)
    return Pair(latency_s, up, down)


def ping(address: str, port: int, key: str) -> tuple[float, float]:
    """Latency (half the fastest round trip), and the other host's clock minus ours at that ping.

    Computed as in NTP; the error of the offset is at most that latency. Raises OSError.
    """
    best = (float("inf"), 0.0)
    with _connect(address, port, key, PING) as connection:
        for _ in range(PINGS):
            sent, start = time(), perf_counter()
            connection.sendall(b".")
            (theirs,) = CLOCK.unpack(_exactly(connection, CLOCK.size))
            round_trip = perf_counter() - start
            best = min(best, (round_trip / 2, theirs - (sent + round_trip / 2)))
    return best


def ring_rate(listener: Listener, following: tuple[str, int]) -> float:
    """Bytes per second received from the previous rank while sending to the next one at full speed.

    The previous rank connects to `listener`. With all ranks at once, this is the bandwidth available to a
    ring allreduce on these links and cores.
    """
    with ThreadPoolExecutor(1) as sender:
        sending = sender.submit(_send_along, *following, listener.key)
        with _first(listener, RING) as before:
            before.settimeout(LIMIT_S)
            rate = _receive_rate(before)
        sending.result(LIMIT_S)
        return rate


def _send_along(address: str, port: int, key: str) -> None:
    with _connect(address, port, key, RING) as after:
        _send_for(after, 2 * STREAM_S)


def _first(listener: Listener, purpose: str) -> socket.socket:
    """The first connection for this purpose; raises OSError if there is none in time."""
    deadline = monotonic() + LIMIT_S
    while monotonic() < deadline:
        for hello, connection in listener.admit(STOP_S):
            if hello.get("for") == purpose:
                return connection
            connection.close()
    raise TimeoutError("the previous rank has not connected")


def _serve(listener: Listener, stop: threading.Event) -> None:
    while not stop.is_set():
        for hello, connection in listener.admit(STOP_S):
            with connection, suppress(OSError):
                connection.settimeout(LIMIT_S)
                _answer(connection, hello.get("for"))


def _answer(connection: socket.socket, purpose: object) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if purpose == PING:
        for _ in range(PINGS):
            _exactly(connection, 1)
            connection.sendall(CLOCK.pack(time()))
    elif purpose == UP:
        connection.sendall(RATE.pack(_receive_rate(connection)))
    elif purpose == DOWN:
        _send_for(connection, STREAM_S)


def _connect(address: str, port: int, key: str, purpose: str) -> socket.socket:
    connection = connect([Endpoint(address, port)], key, {"for": purpose}, LIMIT_S)
    connection.settimeout(LIMIT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _send_for(connection: socket.socket, seconds: float) -> None:
    end = perf_counter() + seconds
    with suppress(OSError):  # the other end notices it and reports
        while perf_counter() < end:
            connection.sendall(BLOCK)
        connection.shutdown(socket.SHUT_WR)


def _receive_rate(connection: socket.socket) -> float:
    """Bytes per second from the first byte to the last; raises OSError if there are none."""
    buffer, received, start = bytearray(1 << 20), 0, 0.0
    while count := connection.recv_into(buffer):
        start = start or perf_counter()
        received += count
    if not received:
        raise ConnectionError("no data received")
    return received / max(1e-9, perf_counter() - start)


def _exactly(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        part = connection.recv(size - len(found))
        if not part:
            raise ConnectionError("connection closed by the other end")
        found += part
    return found
