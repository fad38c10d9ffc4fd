"""Ranks that meet beside Horovod, as threads of one process, through the launcher's kind of store."""

import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from horovod_owt.commands import data_verify
from horovod_owt.data.verify import Finding, Findings, merged
from horovod_owt.errors import DataError, RunError
from horovod_owt.parallel import control_channel, rendezvous
from horovod_owt.parallel.control_channel import CONNECT, open_control_channel
from horovod_owt.parallel.interfaces import addresses_of
from horovod_owt.topology import Topology


class Store(BaseHTTPRequestHandler):
    """PUT keeps, GET gives: what Horovod's rendezvous server does with any scope."""

    kept: dict[str, bytes] = {}

    def do_PUT(self):
        self.kept[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()

    def do_GET(self):
        found = self.kept.get(self.path)
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(found or b"")

    def log_message(self, *_):
        pass


@pytest.fixture
def ranks(monkeypatch):
    """Calls a function of (topology) on each of some ranks at once; gives what each returned or raised."""
    Store.kept = {}
    with ThreadingHTTPServer(("127.0.0.1", 0), Store) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv(control_channel.STORE_ADDRESS, "127.0.0.1")
        monkeypatch.setenv(control_channel.STORE_PORT, str(server.server_address[1]))
        monkeypatch.setattr(control_channel, "GRACE_S", 0.2)

        class AlwaysFirst:  # threads share a process's count of meetings
            def __iadd__(self, _):
                return self

            def __str__(self):
                return "1"

        monkeypatch.setattr(control_channel, "_channels", AlwaysFirst())

        def run(act, size, here=None):
            def one(rank):
                try:
                    return act(Topology("horovodrun", rank, size, rank, size, f"host{rank}"))
                except RunError as error:
                    return error

            with ThreadPoolExecutor(size) as threads:
                return list(threads.map(one, range(size) if here is None else here))

        yield run
        server.shutdown()


def test_rank_0_hears_all_and_all_hear_rank_0(ranks):
    def act(topology):
        with open_control_channel(topology, limit_s=10) as met:
            heard = met.gather({"from": topology.rank}, 10, "hello")
            return heard, met.broadcast([topology.rank, "word"]), met.absent

    said = ranks(act, 4)
    assert said[0][0] == {rank: {"from": rank} for rank in range(4)}
    assert [heard for heard, _, _ in said[1:]] == [{}] * 3
    assert [word for _, word, _ in said] == [[0, "word"]] * 4 and said[0][2] == {}


def test_a_silent_rank_is_named_with_its_host_and_the_question_and_the_others_continue(ranks):
    released = threading.Event()

    def act(topology):
        with open_control_channel(topology, limit_s=10) as met:
            if topology.rank == 1:
                released.wait(20)
                return met.gather("late", 0.5, "first")
            heard = met.gather("in time", 0.5, "first"), met.gather("again", 10, "second")
            met.broadcast(None)
            released.set()
            return heard, dict(met.absent)

    (first, second), absent = ranks(act, 3)[0]
    assert set(first) == set(second) == {0, 2}
    assert absent == {1: ("host1", "first")}


def test_a_rank_that_never_connects_is_named_when_time_is_up(ranks):
    def act(topology):
        with open_control_channel(topology, limit_s=1.0) as met:
            return met.gather(topology.rank, 5), met.absent

    heard, absent = ranks(act, 3, here=[0, 2])[0]
    assert heard == {0: 0, 2: 2} and absent == {1: ("", CONNECT)}


def test_without_rank_0_the_others_say_so_and_do_not_wait_on(ranks):
    def act(topology):
        with open_control_channel(topology, limit_s=0.5):
            raise AssertionError

    (error,) = ranks(act, 2, here=[1])
    assert "rank 1 on host1 has no address of rank 0" in str(error)


def test_when_rank_0_goes_the_others_hear_of_it(ranks):
    def act(topology):
        with open_control_channel(topology, limit_s=10) as met:
            met.gather(None, 10)
            return None if met.is_root else met.broadcast(limit_s=30)

    assert "heard nothing from rank 0 on host0" in str(ranks(act, 2)[1])


def test_a_lone_rank_needs_no_network(monkeypatch):
    monkeypatch.setattr(socket, "create_server", None)
    with open_control_channel(Topology("none", 0, 1, 0, 1, "here")) as met:
        assert met.gather(7, 1) == {0: 7} and met.broadcast({"a": 1}) == {"a": 1}


@pytest.fixture
def strangers(monkeypatch):
    """Connections that are silent or send garbage to whatever address rank 0 announces, before the ranks."""
    made = []
    real = control_channel._exchange_address

    def exchange(topology, address, deadline):
        for place in address.endpoints if address else ():
            draw = random.Random(1)
            for number in range(200):
                made.append(socket.create_connection(place, timeout=10))
                if number % 2:
                    made[-1].setblocking(False)
                    with suppress(OSError):
                        made[-1].send(draw.randbytes(draw.randrange(1, 5000)))
        return real(topology, address, deadline)

    monkeypatch.setattr(control_channel, "_exchange_address", exchange)
    yield made
    for one in made:
        one.close()


@pytest.mark.parametrize("ip", ["127.0.0.1", "::1"])
def test_ranks_meet_among_strangers_and_nobody_listens_afterwards(ranks, strangers, monkeypatch, ip):
    if ip not in addresses_of("lo"):
        pytest.skip("no IPv6 here")
    monkeypatch.setattr(rendezvous, "listening_addresses", lambda env, one_host: [ip])
    places = []

    def act(topology):
        with open_control_channel(topology, limit_s=10) as met:
            if met.is_root:
                places.append(strangers[0].getpeername())
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection(places[0][:2], timeout=5)
            return met.gather(topology.rank, 10), met.absent

    start = time.monotonic()
    assert ranks(act, 3)[0] == ({0: 0, 1: 1, 2: 2}, {})
    assert len(strangers) == 200 and places[0][0] == ip and time.monotonic() - start < 8


def test_a_rank_that_sends_a_line_without_end_is_dropped_not_kept(ranks, monkeypatch):
    monkeypatch.setattr(control_channel, "LINE_BYTES", 1 << 16)

    def act(topology):
        with open_control_channel(topology, limit_s=10) as met:
            if topology.rank == 1:
                with suppress(OSError):
                    met._links[0]._connection.sendall(b"x" * (1 << 22))
                return None
            return met.gather(topology.rank, 3, "values"), met.absent

    heard, absent = ranks(act, 3)[0]
    assert heard == {0: 0, 2: 2} and absent == {1: ("host1", "values")}


def test_findings_of_any_number_reach_rank_0(ranks, monkeypatch):
    """A rank whose message was too long was dropped, with all that it had found in hours."""
    monkeypatch.setattr(control_channel, "LINE_BYTES", 10_000)
    monkeypatch.setattr(data_verify, "PIECE", 50)

    def act(topology):
        numbers = range(1000 * topology.rank, 1000 * topology.rank + 210 * topology.rank)
        odd = [Finding("val", number, f"/set/val/cat/{number}.JPEG", "PNG named .JPEG") for number in numbers]
        bad = [Finding("val", 1000 * topology.rank + 999, "/set/val/cat/bad.JPEG", "empty file")]
        with open_control_channel(topology, limit_s=10) as met:
            return data_verify.gathered(met, Findings(images=1000, bad=bad, remarks=odd)), met.absent

    (parts, absent), *others = ranks(act, 3)
    whole = merged(parts)
    assert absent == {} and [found for found, _ in others] == [[], []]
    assert whole.images == 3000 and [each.index for each in whole.bad] == [999, 1999, 2999]
    assert [each.index for each in whole.remarks] == [*range(1000, 1210), *range(2000, 2420)]


@pytest.mark.parametrize("other", ["5 images", "6 images"])
def test_ranks_that_share_the_images_have_the_same(ranks, other):
    """Each takes its part of its own list: of another list it would be other images."""

    def act(topology):
        with open_control_channel(topology, limit_s=10) as met:
            try:
                data_verify.check_same(met, other if topology.rank == 1 else "6 images")
            except DataError as error:
                return str(error)

    said = ranks(act, 3)
    if other == "6 images":
        assert said == [None] * 3
    else:
        assert len(set(said)) == 1 and said[0].startswith(
            "rank 1 has 5 images, rank 0 others; wanted the same"
        )
