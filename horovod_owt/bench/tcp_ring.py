"""A plain ring allreduce over TCP sockets: what a collective can reach on this host and network.

Each rank sends a chunk of 1/n of the buffer to the next rank and receives one from the previous rank,
2 (n-1) times; it adds up the first n-1 (reduce-scatter) and copies the rest (allgather).
"""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from time import perf_counter

import numpy as np

from horovod_owt.parallel.admission import family_of

LIMIT_S = 60.0


class TcpRing:
    """One rank's connections to its neighbours."""

    def __init__(self, rank: int, addresses: list[tuple[str, int]], server: socket.socket) -> None:
        """`addresses` are those of the ranks' servers, by rank; all ranks must call it at the same time."""
        self._rank, self._size = rank, len(addresses)
        server.settimeout(LIMIT_S)
        self._next = socket.create_connection(addresses[(rank + 1) % self._size], timeout=LIMIT_S)
        self._previous, _ = server.accept()
        for connection in (self._next, self._previous):
            connection.settimeout(LIMIT_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def allreduce(self, values: np.ndarray) -> None:
        """Sum `values` over the ranks in place; their number must be a multiple of the number of ranks."""
        chunks = values.reshape(self._size, -1)
        arriving = np.empty_like(chunks[0])
        for step in range(2 * (self._size - 1)):
            adds = step < self._size - 1
            into = chunks[(self._rank - step - 1) % self._size]
            sender = Thread(target=self._next.sendall, args=(chunks[(self._rank - step) % self._size],))
            sender.start()
            self._receive(arriving if adds else into)
            sender.join()
            if adds:
                into += arriving

    def close(self) -> None:
        self._next.close()
        self._previous.close()

    def _receive(self, into: np.ndarray) -> None:
        view = memoryview(into).cast("B")
        while view:
            count = self._previous.recv_into(view)
            if not count:
                raise ConnectionError("the previous rank in the ring closed its connection")
            view = view[count:]


def open_server(host: str = "127.0.0.1") -> socket.socket:
    return socket.create_server((host, 0), family=family_of(host))


def time_ring(ring: TcpRing, num_bytes: int, *, repeats: int) -> list[float]:
    """Seconds of each allreduce of `num_bytes` of fp32 values, after an untimed one."""
    values = np.zeros(num_bytes // 4, dtype=np.float32)
    seconds = []
    for _ in range(repeats + 1):
        start = perf_counter()
        ring.allreduce(values)
        seconds.append(perf_counter() - start)
    return seconds[1:]


@contextmanager
def pair_on_this_host(work: list[tuple[int, int]]) -> Iterator[Callable[[], list[list[float]]]]:
    """Start a second process, so that a single rank can time a ring of two.

    `work` is a list of (bytes, repeats). The function yielded runs it and returns the seconds of each.
    """
    context = multiprocessing.get_context("spawn")
    server = open_server()
    ours, theirs = context.Pipe()
    peer = context.Process(target=_peer, args=(server.getsockname(), work, theirs), daemon=True)
    peer.start()
    try:
        if not ours.poll(LIMIT_S):
            raise ConnectionError("the second process of the ring did not start")
        addresses = [server.getsockname(), ours.recv()]

        def run() -> list[list[float]]:
            ring = TcpRing(0, addresses, server)
            found = [time_ring(ring, size, repeats=repeats) for size, repeats in work]
            ring.close()
            return found

        yield run
    finally:
        peer.join(5)
        if peer.is_alive():
            peer.kill()
        server.close()


def _peer(address: tuple[str, int], work: list[tuple[int, int]], connection) -> None:
    with open_server() as server:
        connection.send(server.getsockname())
        ring = TcpRing(1, [address, server.getsockname()], server)
        for size, repeats in work:
            time_ring(ring, size, repeats=repeats)
        ring.close()
