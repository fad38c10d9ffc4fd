"""Plain TCP between two ranks: how long a word takes, how many bytes pass, how far clocks are apart."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import perf_counter, time

PINGS = 40
STREAM_S = 0.3  # for how long bytes are sent each way
BLOCK = bytes(1 << 20)
LIMIT_S = 8.0  # to connect, and for any silence
PING, UP, DOWN = b"P", b"U", b"D"  # the first byte of a connection: what it is for
CLOCK = struct.Struct("!d")
RATE = struct.Struct("!d")


@dataclass(frozen=True)
class Pair:
    """What one host found on its way to another."""

    latency_s: float  # of a word there, half of there and back
    up_bytes_per_s: float  # towards the other
    down_bytes_per_s: float


@contextmanager
def answering(address: str) -> Iterator[int]:
    """A port at `address` that plays the other end of `measure`, for as long as the block lasts."""
    with socket.create_server((address, 0)) as listener:
        threading.Thread(target=_serve, args=(listener,), daemon=True, name="wire").start()
        try:
            yield listener.getsockname()[1]
        finally:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread, which close() alone would not


def measure(address: str, port: int) -> Pair:
    """Latency, then bytes there, then bytes back; raises OSError."""
    latency_s, _ = ping(address, port)
    with _connect(address, port, UP) as connection:
        _send_for(connection, STREAM_S)
        (up,) = RATE.unpack(_exactly(connection, RATE.size))
    with _connect(address, port, DOWN) as connection:
        down = _receive_rate(connection)
    return Pair(latency_s, up, down)


def ping(address: str, port: int) -> tuple[float, float]:
    """Half the time of the quickest of some pings, and the other's clock minus ours as that one has it.

    As NTP reckons; the clock is off by at most that time. Raises OSError.
    """
    best = (float("inf"), 0.0)
    with _connect(address, port, PING) as connection:
        for _ in range(PINGS):
            sent, start = time(), perf_counter()
            connection.sendall(b".")
            (theirs,) = CLOCK.unpack(_exactly(connection, CLOCK.size))
            there_and_back = perf_counter() - start
            best = min(best, (there_and_back / 2, theirs - (sent + there_and_back / 2)))
    return best


def ring_rate(listener: socket.socket, following: tuple[str, int]) -> float:
    """Bytes per second from the rank before, while the rank after is sent as much as it takes.

    `listener` is this rank's own, which the rank before connects to. All ranks at once, this is what a ring
    can move, on these links and with these cores: Horovod's allreduce sends the same way.
    """
    with socket.create_connection(following, timeout=LIMIT_S) as after:
        listener.settimeout(LIMIT_S)
        before, _ = listener.accept()
        with before:
            before.settimeout(LIMIT_S)
            sender = threading.Thread(target=_send_for, args=(after, 2 * STREAM_S), daemon=True)
            sender.start()
            rate = _receive_rate(before)
            sender.join(LIMIT_S)
            return rate


def _serve(listener: socket.socket) -> None:
    with suppress(OSError):
        while True:
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                connection.settimeout(LIMIT_S)
                _answer(connection)


def _answer(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    purpose = _exactly(connection, 1)
    if purpose == PING:
        for _ in range(PINGS):
            _exactly(connection, 1)
            connection.sendall(CLOCK.pack(time()))
    elif purpose == UP:
        connection.sendall(RATE.pack(_receive_rate(connection)))
    elif purpose == DOWN:
        _send_for(connection, STREAM_S)


def _connect(address: str, port: int, purpose: bytes) -> socket.socket:
    connection = socket.create_connection((address, port), timeout=LIMIT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(purpose)
    return connection


def _send_for(connection: socket.socket, seconds: float) -> None:
    end = perf_counter() + seconds
    with suppress(OSError):  # the other end sees it, too, and says so
        while perf_counter() < end:
            connection.sendall(BLOCK)
        connection.shutdown(socket.SHUT_WR)


def _receive_rate(connection: socket.socket) -> float:
    """Bytes per second from the first byte to the last; raises OSError if there were none."""
    buffer, received, start = bytearray(1 << 20), 0, 0.0
    while count := connection.recv_into(buffer):
        start = start or perf_counter()
        received += count
    if not received:
        raise ConnectionError("nothing came")
    return received / max(1e-9, perf_counter() - start)


def _exactly(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        part = connection.recv(size - len(found))
        if not part:
            raise ConnectionError("the other end hung up")
        found += part
    return found
