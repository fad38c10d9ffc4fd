"""The heartbeat of a rank 0, with a rank 1 that the tests play over a real connection."""

import json
import logging
import random
import socket
import threading
import time
from contextlib import contextmanager

import psutil
import pytest
import torch

from horovod_owt.parallel import heartbeat, rendezvous
from horovod_owt.parallel.activity import now
from horovod_owt.parallel.interfaces import addresses_of
from horovod_owt.parallel.rendezvous import Address, abort_connections, connect_to_root
from horovod_owt.parallel.runtime import World


class Rank1:
    """What rank 1 would say and hear."""

    sockets: list[socket.socket] = []  # of all that are played

    def __init__(self, address: Address, rank: int = 1) -> None:
        self._socket = connect_to_root(address, rank, "node7")
        self._socket.settimeout(5)
        self.sockets.append(self._socket)
        self._heard = self._socket.makefile("rb")

    def say(self, **message) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def send(self, sent: bytes) -> None:
        self._socket.sendall(sent)

    def is_open(self) -> bool:
        """Whether rank 0 has not closed the connection; waits for the next message."""
        try:
            return self._heard.readline() != b""
        except ConnectionError:
            return False

    def is_heard_of(self) -> bool:
        return "what" in json.loads(self._heard.readline())

    def forget_beats(self) -> None:
        """Read those that have arrived."""
        self._socket.setblocking(False)
        while self._heard.read(1 << 16):
            pass
        self._socket.settimeout(5)

    def is_asked_to_dump(self) -> bool:
        return any("dump" in json.loads(line) for line in self._heard)

    def is_told_to_abort(self) -> bool:
        return any("abort" in json.loads(line) for line in self._heard)

    def hears_goodbye(self) -> bool:
        return any("bye" in json.loads(line) for line in self._heard)

    def leave(self) -> None:
        self._heard.close()
        self._socket.close()


@pytest.fixture
def rank0(monkeypatch):
    """A heartbeat under way, with the calls it makes as lists of what it said."""
    told = {}
    monkeypatch.setattr(
        heartbeat, "broadcast_object", lambda address, name, kind: told.setdefault("all", address)
    )
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.05)
    monkeypatch.setattr(Rank1, "sockets", [])

    def abort_all_but_played(*, keep):
        """In a job the other ends of rank 0's connections are in other processes, out of its reach."""
        abort_connections(keep=keep | {played.fileno() for played in Rank1.sockets})

    monkeypatch.setattr(heartbeat, "abort_connections", abort_all_but_played)

    @contextmanager
    def start(report_s=60.0, give_up_s=600.0, regroup_s=None, silent_s=60.0, size=2):
        monkeypatch.setattr(heartbeat, "SILENT_S", silent_s)
        calls = {name: Call() for name in ("report", "give_up", "dump", "on_death")}
        world = World(0, size, 0, size, "node6", torch.device("cpu"), 1)
        limits = dict(report_s=report_s, give_up_s=give_up_s, regroup_s=regroup_s)
        with heartbeat.Heartbeat(world, **limits, **calls) as call:
            address = told["all"]
            assert address.host == "node6"
            yield call, address, calls

    return start


class Call:
    """A function that remembers what it was told, and lets others wait for that."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self._called = threading.Event()

    def __call__(self, what: str) -> None:
        self.said.append(what)
        self._called.set()

    def wait(self) -> str:
        assert self._called.wait(10), "never called"
        return self.said[0]


def wait_for(condition, limit_s=10):
    """Poll until `condition` gives something true, and return that."""
    end = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    return found


def test_a_rank_that_leaves_without_a_goodbye_is_named_with_host_and_step(rank0, caplog):
    with rank0() as (call, address, calls), caplog.at_level(logging.ERROR):
        rank1 = Rank1(address)
        rank1.say(step=41, what="computing", waiting=False, for_s=0.1)
        rank1.leave()
        assert "rank 1 on node7" in calls["on_death"].wait() and "41" in calls["on_death"].said[0]
        assert call.lost().startswith("rank 1 on node7")
    assert "rank 1 on node7" in caplog.text


@pytest.fixture
def connection():
    """Both ends of one that Gloo might have."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname(), timeout=5)
        far, _ = listener.accept()
        with near, far:
            far.settimeout(1.0)
            yield near, far


@pytest.mark.parametrize("regroup_s", [None, 20.0])
def test_where_ranks_regroup_a_death_ends_the_collectives_of_all(rank0, connection, regroup_s):
    near, far = connection
    with rank0(regroup_s=regroup_s, size=3) as (_, address, calls):
        rank1, rank2 = Rank1(address), Rank1(address, rank=2)
        rank1.leave()
        assert "rank 1" in calls["on_death"].wait()
        if regroup_s is None:
            with pytest.raises(TimeoutError):
                far.recv(1)
        else:
            assert far.recv(1) == b"" and rank2.is_told_to_abort()
        rank2.say(bye=True)
        rank2.leave()
    assert len(calls["on_death"].said) == 1


def test_a_host_without_power_is_noticed_by_what_it_does_not_acknowledge(rank0):
    """Here the limit is seen to be set; tests/cluster powers a host off."""
    with rank0(regroup_s=20.0) as (call, address, _):
        rank1 = Rank1(address)
        rank1.say(step=1, what="computing", waiting=False, for_s=0.1)
        (peer,) = wait_for(lambda: list(call._peers.values()))
        assert peer.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20000
        rank1.say(bye=True)
        rank1.leave()


def test_a_rank_that_says_goodbye_is_not_lost(rank0, caplog):
    with rank0() as (call, address, calls), caplog.at_level(logging.WARNING):
        rank1 = Rank1(address)
        rank1.say(bye=True)
        rank1.leave()
        assert call.lost(wait_s=0.5) == ""
    assert not calls["on_death"].said and not caplog.text


def test_a_goodbye_is_said_and_waited_for_however_late_its_thread_comes_to_it(rank0, monkeypatch):
    """As on a host whose cores are taken: else the others would take this rank for dead."""
    cores_are_free = threading.Event()
    with rank0() as (call, address, _):
        rank1 = Rank1(address)
        monkeypatch.setattr(
            heartbeat.Heartbeat, "_longest_wait", lambda self: (cores_are_free.wait(10) and 0.0, "")
        )
        wait_for(lambda: call._peers)
        threading.Timer(0.5, cores_are_free.set).start()
    assert not call._thread.is_alive() and rank1.hears_goodbye()
    rank1.leave()


@pytest.mark.parametrize(
    "hello",
    [b'{"challenge": "1", "hello": {"rank": 1, "host": "x"}, "proof": "0"}\n', b"GET /\n", b"[]\n", b"1\n"],
)
def test_a_stranger_is_sent_away_and_a_rank_still_let_in(rank0, hello):
    with rank0() as (call, address, _):
        with socket.create_connection(address.endpoints[0], timeout=5) as stranger:
            stranger.sendall(hello)
            assert stranger.makefile("rb").readlines()[1:] == []  # the challenge, then the end
        rank1 = Rank1(address)
        assert call.lost(wait_s=0.0) == ""
        rank1.say(bye=True)
        rank1.leave()


def test_a_busy_rank_is_reported_asked_for_its_stacks_and_then_given_up(rank0):
    with rank0(report_s=0.5, give_up_s=1.3) as (call, address, calls):
        rank1 = Rank1(address)
        rank1.say(step=7, what="reading images", waiting=False, for_s=3.0)
        wait_for(lambda: call._peers and call._peers[1].what == "reading images")
        with now.waiting_in("gradients.0"):
            said = calls["report"].wait()
            assert "rank 1 on node7" in said and "reading images" in said and "'gradients.0'" in said
            assert rank1.is_asked_to_dump() and calls["dump"].said
            assert "rank 1 on node7" in calls["give_up"].wait()
        rank1.leave()


def test_a_silent_rank_is_reported_as_silent_once_a_limit(rank0):
    with rank0(report_s=0.6, give_up_s=2.0, silent_s=0.3) as (_, address, calls), now.waiting_in("loss"):
        rank1 = Rank1(address)
        assert "rank 1 on node7 has been silent" in calls["give_up"].wait()
        assert 1 <= len(calls["report"].said) <= 3
        rank1.leave()


def test_no_rank_is_reported_while_ranks_compute(rank0):
    with rank0(report_s=0.2, give_up_s=0.4) as (_, address, calls), now.phase("validating"):
        rank1 = Rank1(address)
        for _ in range(12):
            rank1.say(step=1, what="validating", waiting=False, for_s=60)
            time.sleep(0.05)
        rank1.say(bye=True)
        rank1.leave()
    assert not calls["report"].said and not calls["give_up"].said


@pytest.mark.parametrize("ip", ["127.0.0.1", "::1"])
def test_rank_0_stops_listening_once_all_ranks_are_connected(rank0, monkeypatch, ip):
    if ip not in addresses_of("lo"):
        pytest.skip("no IPv6 here")
    monkeypatch.setattr(rendezvous, "listening_addresses", lambda env, one_host: [ip])
    with rank0() as (call, address, calls):
        assert [endpoint.ip for endpoint in address.endpoints] == [ip]
        rank1 = Rank1(address)
        assert rank1.is_heard_of()
        wait_for(lambda: call._rendezvous is None)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address.endpoints[0], timeout=5)
        rank1.say(step=3, what="computing", waiting=False, for_s=0.1)
        rank1.leave()
        assert "rank 1 on node7" in calls["on_death"].wait() and "step 3" in calls["on_death"].said[0]


def test_a_rank_that_connects_again_replaces_its_first_connection(rank0):
    with rank0(size=3) as (call, address, calls):
        first, second = Rank1(address), Rank1(address)
        assert second.is_heard_of()
        wait_for(lambda: not first.is_open())
        second.say(bye=True)
        second.leave()
        first.leave()
    assert not calls["on_death"].said


@pytest.mark.parametrize("rank", [0, -1, 3, "1", None, True, 1.0])
def test_a_rank_that_the_job_does_not_have_is_not_kept(rank0, rank):
    with rank0(size=3) as (call, address, _):
        assert not Rank1(address, rank=rank).is_open()
        assert Rank1(address).is_heard_of() and call._peers.keys() == {1}


@pytest.mark.parametrize("sent", [b"no JSON\n", b'{"what": 1}\n', b"1\n", b"x" * (1 << 17), b"\xff\n"])
def test_a_connection_that_carries_no_heartbeat_is_lost_and_the_thread_lives(rank0, sent):
    with rank0(size=3) as (call, address, calls):
        rank1, rank2 = Rank1(address), Rank1(address, rank=2)
        rank1.send(sent)
        assert "rank 1 on node7" in calls["on_death"].wait()
        assert rank2.is_heard_of() and call._thread.is_alive()


def test_strangers_neither_stop_the_heartbeat_nor_make_it_grow_nor_keep_a_rank_out(rank0):
    draw, process = random.Random(3), psutil.Process()
    with rank0(size=3) as (call, address, calls):
        rank1, before = Rank1(address), process.memory_info().rss
        silent = [socket.create_connection(address.endpoints[0], timeout=10) for _ in range(300)]
        for size in [*(draw.randrange(1, 2000) for _ in range(100)), 4 << 20]:
            with socket.create_connection(address.endpoints[0], timeout=10) as stranger:
                try:
                    stranger.sendall(draw.randbytes(size).replace(b"\n", b"x"))
                except OSError:  # dropped
                    pass
        start = time.monotonic()
        rank1.forget_beats()
        for _ in range(5):
            assert rank1.is_heard_of()
        assert time.monotonic() - start < 2  # five times BEAT_S, which is 0.05 s here, and the loop's 0.2 s
        assert Rank1(address, rank=2).is_heard_of()
        assert process.memory_info().rss - before < 30 << 20
        assert call._thread.is_alive() and not calls["on_death"].said
        for one in silent:
            one.close()


@pytest.mark.parametrize("size", [2, 256, 4096, 100_000])
def test_rank_0_gets_at_most_512_beats_a_second_however_many_ranks_there_are(monkeypatch, size):
    monkeypatch.setattr(heartbeat, "broadcast_object", lambda address, name, kind: address)
    does_nothing = dict.fromkeys(("report", "give_up", "dump", "on_death"), lambda what: None)
    world = World(1, size, 0, 2, "node6", torch.device("cpu"), 1)
    beats = heartbeat.Heartbeat(world, report_s=60, give_up_s=600, **does_nothing)
    assert size / beats.beat_s <= 512 and (beats.beat_s == 0.5 or size > 256)
    assert beats._silent_s == 6 * beats.beat_s


def test_a_beat_costs_no_look_at_all_other_ranks(rank0, monkeypatch):
    monkeypatch.setattr(heartbeat, "CHECK_S", 60.0)
    looks = []
    monkeypatch.setattr(heartbeat.Heartbeat, "_longest_wait", lambda self: (looks.append(1) or 0.0, ""))
    with rank0() as (call, address, _):
        rank1 = Rank1(address)
        for step in range(50):
            rank1.say(step=step, what="computing", waiting=False, for_s=0.1)
            wait_for(lambda step=step: call._peers and call._peers[1].step == step)
        assert len(looks) == 1
        rank1.say(bye=True)
        rank1.leave()


def test_the_death_of_many_ranks_names_a_few_and_writes_few_outcomes(rank0):
    with rank0(size=13) as (call, address, calls):
        for rank in [Rank1(address, rank=rank) for rank in range(1, 13)]:
            wait_for(rank.is_heard_of)
            rank.leave()
        wait_for(lambda: len(call._lost) == 12)
        assert call.lost().count("on node7") == 8 and call.lost().endswith(" and 4 more")
    assert len(calls["on_death"].said) == 8
