"""Gather and broadcast with timeouts, without Horovod: rank 0 knows which ranks did not answer.

For commands that check a job before it runs, which must not hang on the fault that they look for. Needs
neither torch nor `hvd.init`: ranks get rank 0's address from the launcher's key-value store (Gloo) or by an
MPI broadcast, and then communicate with it over TCP.
"""

from __future__ import annotations

import json
import os
import socket
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from time import monotonic, sleep
from typing import Any

from horovod_owt.errors import RunError
from horovod_owt.parallel.lines import Lines, json_line
from horovod_owt.parallel.mpi import sees_gpus, yield_when_idle
from horovod_owt.parallel.objects import from_json, to_json
from horovod_owt.parallel.rendezvous import Address, Rendezvous, connect_to_root
from horovod_owt.topology import Launcher, Topology

CONNECT = "connect"  # the question in `ControlChannel.absent` of ranks that never connected
GRACE_S = 2.0  # for an answer in transit
POLL_S = 0.05
LINE_BYTES = 16 << 20  # of a value: limits what rank 0 buffers per rank
ADDRESS_BYTES = 4096  # of the MPI broadcast, whose size all ranks must know
STORE_ADDRESS, STORE_PORT = "HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT"
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # to hosts of the job
_channels = 0  # opened by this process so far: each uses another key in the launcher's store


class Link:
    """Sends and receives JSON values over a connection, each with a deadline."""

    def __init__(self, host: str, connection: socket.socket) -> None:
        self.host, self._connection = host, connection
        self._lines, self._arrived = Lines(LINE_BYTES), deque[Any]()

    def send(self, value: Any, deadline: float) -> None:
        """Raises OSError if the other end is gone or does not read."""
        self._connection.settimeout(max(POLL_S, deadline - monotonic()))
        self._connection.sendall(json_line(value))

    def receive(self, deadline: float) -> Any:
        """Raises OSError if the other end is gone or silent, ValueError for a line that is not JSON."""
        while not self._arrived:
            # data that has already arrived is read even after the deadline
            self._connection.settimeout(max(POLL_S, deadline - monotonic()))
            arrived = self._connection.recv(1 << 20)
            if not arrived:
                raise ConnectionError(f"{self.host} is gone")
            self._arrived.extend(self._lines.feed(arrived))
        return self._arrived.popleft()

    def close(self) -> None:
        self._connection.close()


class ControlChannel:
    """Connections of all ranks to rank 0. All must make the same calls in the same order.

    A rank that misses a deadline is dropped: on rank 0, `absent` maps it to its host, if known, and to the
    question that it did not answer.
    """

    def __init__(self, topology: Topology) -> None:
        self.rank, self.size, self._host = topology.rank, topology.world_size, topology.host
        self.absent: dict[int, tuple[str, str]] = {}
        self._links: dict[int, Link] = {}

    @property
    def is_root(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any, limit_s: float, what: str = "") -> dict[int, Any]:
        """Every present rank's `value` (JSON types) by rank, on rank 0; empty on the others.

        Rank 0 waits up to `limit_s`; `what` names the question, for `absent`.
        """
        deadline = monotonic() + limit_s
        if not self.is_root:
            self._with_root(lambda link: link.send(value, deadline + GRACE_S))
            return {}
        values = {0: value}
        for rank, link in sorted(self._links.items()):
            try:
                values[rank] = link.receive(deadline + GRACE_S)
            except (OSError, ValueError):
                self._lose(rank, link, what)
        return values

    def broadcast(self, value: Any = None, limit_s: float = 60.0) -> Any:
        """Rank 0's `value` (JSON types), on every rank; raises RunError if rank 0 does not answer."""
        deadline = monotonic() + limit_s
        if not self.is_root:
            return self._with_root(lambda link: link.receive(deadline + GRACE_S))
        for rank, link in sorted(self._links.items()):
            try:
                link.send(value, deadline)
            except OSError:
                self._lose(rank, link, "listen")
        return json.loads(json.dumps(value))  # the same types as on the other ranks

    def _lose(self, rank: int, link: Link, what: str) -> None:
        self.absent[rank] = (link.host, what)
        link.close()
        del self._links[rank]

    def _with_root(self, act: Callable[[Link], Any]) -> Any:
        try:
            return act(self._links[0])
        except (OSError, ValueError) as error:
            raise RunError(
                f"rank {self.rank} on {self._host} heard nothing from rank 0 on {self._links[0].host}: "
                f"{error}",
                wanted="an answer in time",
                fix="see rank 0's output; check that its host is up",
            ) from None

    def _assemble(self, rendezvous: Rendezvous, limit_s: float) -> None:
        """Admit connections until all ranks are connected or time is up."""
        deadline = monotonic() + limit_s
        while len(self._links) < self.size - 1 and (left_s := deadline - monotonic()) > 0:
            for rank, host, connection in rendezvous.admit(min(left_s, 1.0)):
                if rank in self._links:  # it gave up its first connection and reconnected
                    self._links[rank].close()
                self._links[rank] = Link(host, connection)
        for rank in set(range(1, self.size)) - self._links.keys():
            self.absent[rank] = ("", CONNECT)


@contextmanager
def open_control_channel(topology: Topology, *, limit_s: float = 60.0) -> Iterator[ControlChannel]:
    """Connect all ranks, within `limit_s`, for the duration of the block.

    Raises RunError on a rank that cannot reach rank 0.
    """
    channel = ControlChannel(topology)
    with ExitStack() as stack:
        stack.callback(lambda: [link.close() for link in channel._links.values()])
        if topology.world_size > 1:
            deadline = monotonic() + limit_s
            if channel.is_root:
                one_host = topology.local_size >= topology.world_size
                with closing(Rendezvous(topology.host, topology.world_size, one_host=one_host)) as rendezvous:
                    _exchange_address(topology, rendezvous.address, deadline)
                    channel._assemble(rendezvous, deadline - monotonic())
            else:
                address = _exchange_address(topology, None, deadline)
                try:
                    connection = connect_to_root(address, topology.rank, topology.host)
                except OSError as error:
                    raise RunError(
                        f"rank {topology.rank} on {topology.host} cannot reach {address.host}: {error}",
                        wanted="TCP between all hosts, on any port",
                        fix=f"`ping {address.host}` from there; open the firewall between the hosts",
                    ) from None
                channel._links[0] = Link(address.host, connection)
        yield channel


def _exchange_address(topology: Topology, address: Address | None, deadline: float) -> Address:
    """Rank 0's address, on every rank; raises RunError on a rank that does not get it in time."""
    global _channels
    _channels += 1
    if topology.launcher is Launcher.TORCHRUN:
        from horovod_owt.parallel.torchrun import join_torchrun  # its store needs torch

        join_torchrun(topology)
    exchange = _by_store if STORE_ADDRESS in os.environ else _by_mpi
    text = exchange(address and to_json(address), deadline)
    if text is None:
        raise RunError(
            f"rank {topology.rank} on {topology.host} has no address of rank 0",
            wanted="all ranks started together",
            fix="see the launcher's output about rank 0 and its host",
        )
    return from_json(text, Address)


def _by_store(text: str | None, deadline: float) -> str | None:
    """Exchange through the key-value store that the launcher runs for Gloo."""
    url = f"http://{os.environ[STORE_ADDRESS]}:{os.environ[STORE_PORT]}/owt-channel/{_channels}"
    if text is not None:
        request = urllib.request.Request(url, data=text.encode(), method="PUT")
        NO_PROXY.open(request, timeout=max(POLL_S, deadline - monotonic())).close()
        return text
    while monotonic() < deadline:
        try:
            with NO_PROXY.open(url, timeout=max(POLL_S, deadline - monotonic())) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError:  # 404: not there yet
            sleep(POLL_S)
        except OSError:
            break
    return None


def _by_mpi(text: str | None, deadline: float) -> str | None:
    """Exchange by an MPI broadcast."""
    if not sees_gpus():
        yield_when_idle()  # a preflight may later time an allreduce with this MPI
    from mpi4py import MPI

    buffer = bytearray((text or "").encode().ljust(ADDRESS_BYTES))
    request = MPI.COMM_WORLD.Ibcast([buffer, MPI.BYTE], root=0)
    while not request.Test():
        if monotonic() > deadline:
            return None
        sleep(POLL_S)
    return buffer.decode().rstrip()
