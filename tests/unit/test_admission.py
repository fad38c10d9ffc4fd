"""Servers that admit only who knows their key, against strangers who do not."""

import json
import os
import random
import socket
import threading
import time
from contextlib import contextmanager

import psutil
import pytest

from horovod_owt.parallel import admission
from horovod_owt.parallel.admission import MAX_HELLO_BYTES, MAX_PENDING, Endpoint, Listener, connect
from horovod_owt.parallel.lines import Lines, json_line

LOOPBACKS = ["127.0.0.1"]
with socket.socket(socket.AF_INET6) as probe:
    try:
        probe.bind(("::1", 0))
        LOOPBACKS.append("::1")
    except OSError:  # a kernel without IPv6
        pass


@contextmanager
def serving(ip="127.0.0.1", key="key"):
    """A listener under way in a thread; gives it and whom it has admitted."""
    admitted, ending = [], threading.Event()
    with Listener([ip], key) as listener:

        def serve():
            while not ending.is_set():
                admitted.extend(listener.admit(0.05))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener, admitted
        finally:
            ending.set()
            thread.join(10)
            for _, connection in admitted:
                connection.close()


def said_to(place: Endpoint, sent: bytes) -> bytes:
    """All that the server answers to a stranger who sends this and no more."""
    with socket.create_connection(place, timeout=10) as stranger:
        try:
            stranger.sendall(sent)
            stranger.shutdown(socket.SHUT_WR)
            return stranger.makefile("rb").read()
        except OSError:  # dropped while it was sending
            return b""


def is_admitted(place: Endpoint, key="key", limit_s=10.0) -> bool:
    with connect([place], key, {"rank": 1}, limit_s) as connection:
        return connection.fileno() >= 0


@pytest.mark.parametrize("ip", LOOPBACKS)
def test_a_client_with_the_key_is_admitted_and_says_who_it_is(ip):
    with serving(ip) as (listener, admitted):
        with connect(listener.endpoints, "key", {"rank": 3, "host": "n\xfc"}) as there:
            assert listener.endpoints[0].ip == ip
            assert number_of(admitted, 1) == 1
            ((hello, here),) = admitted
            assert hello == {"rank": 3, "host": "n\xfc"}
            here.sendall(b"after")
            assert there.recv(10) == b"after"


@pytest.mark.parametrize("ip", LOOPBACKS)
def test_it_listens_on_its_address_only(ip):
    with Listener([ip], "key") as listener:
        port = listener.endpoints[0].port
        bound = [c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        assert [address.ip for address in bound if address.port == port] == [ip]


def test_neither_side_trusts_one_with_another_key():
    with serving() as (listener, admitted):
        with pytest.raises(OSError, match="no answer at 127.0.0.1 port"):
            connect(listener.endpoints, "another", {}, 0.3)
        assert not admitted


def test_a_client_learns_that_a_server_without_the_key_is_another_and_tells_it_no_key():
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as imposter:

        def answer():
            connection, _ = imposter.accept()
            with connection:
                connection.sendall(json_line({"challenge": "1"}))
                heard.append(connection.recv(1000))
                connection.sendall(json_line({"proof": json.loads(heard[0])["proof"]}))  # its own, sent back

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(OSError, match="is another server"):
            admission._connect(Endpoint(*imposter.getsockname()), "key", {"rank": 1}, time.monotonic() + 5)
        thread.join(10)
    assert b'"rank": 1' in heard[0] and b'key"' not in heard[0]


def test_what_one_client_sent_does_not_admit_another():
    """A proof is of one connection's challenge."""
    with serving() as (listener, admitted), socket.create_server(("127.0.0.1", 0)) as middle:
        recorded = []

        def relay():
            there, _ = middle.accept()
            with there, socket.create_connection(listener.endpoints[0]) as server:
                there.sendall(server.recv(MAX_HELLO_BYTES))
                recorded.append(there.recv(MAX_HELLO_BYTES))
                server.sendall(recorded[0])
                there.sendall(server.recv(MAX_HELLO_BYTES))

        thread = threading.Thread(target=relay)
        thread.start()
        connect([Endpoint(*middle.getsockname())], "key", {"rank": 1}).close()
        thread.join(10)
        assert number_of(admitted, 1) == 1
        assert said_to(listener.endpoints[0], recorded[0]).count(b"\n") == 1  # the challenge, and no proof
        assert len(admitted) == 1


def number_of(admitted: list, wanted: int) -> int:
    """How many are admitted, once they are as many as wanted: a client knows before the server's thread."""
    end = time.monotonic() + 5
    while len(admitted) < wanted and time.monotonic() < end:
        time.sleep(0.01)
    return len(admitted)


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth + b"\n"


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\n",
        b"null\n",
        b"[]\n",
        b"{}\n",
        nested(400),
        b"1" * 990 + b"\n",
        b'{"challenge": "1", "hello": [], "proof": ""}\n',
        b'{"challenge": "1", "hello": {}, "proof": null}\n',
        b'{"challenge": "1", "hello": {}, "proof": "\\ud800"}\n',
        b'{"challenge": {"a": [NaN]}, "hello": {"rank": 1e999}, "proof": "0"}\n',
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\xfe\x00" * 100 + b"\n",
        bytes(MAX_HELLO_BYTES),
        bytes(4 << 20),
    ],
    ids=range(15),
)
def test_whatever_a_stranger_says_it_hears_no_more_than_a_challenge(sent):
    with serving() as (listener, admitted):
        assert said_to(listener.endpoints[0], sent).count(b"\n") <= 1
        assert is_admitted(listener.endpoints[0]) and number_of(admitted, 1) == 1


def test_random_bytes_and_spoiled_answers_admit_nobody():
    draw = random.Random(11)
    hello = {"rank": 1, "host": "n1"}
    good = {"challenge": "1", "hello": hello, "proof": admission.proof("key", "client", ("0", "1"), hello)}
    with serving() as (listener, admitted):
        for _ in range(200):
            sent = bytearray(json_line(good))
            for _ in range(draw.randrange(4)):
                sent[draw.randrange(len(sent))] = draw.randrange(256)
            said_to(
                listener.endpoints[0], draw.choice([bytes(sent), draw.randbytes(draw.randrange(1, 1500))])
            )
        assert not admitted
        assert is_admitted(listener.endpoints[0])


def test_a_flood_of_silent_connections_is_bounded_and_does_not_keep_a_rank_out():
    process, before = psutil.Process(), psutil.Process().num_fds()
    with serving() as (listener, admitted):
        flood = []
        for _ in range(4 * MAX_PENDING):
            flood.append(socket.create_connection(listener.endpoints[0], timeout=10))
        assert is_admitted(listener.endpoints[0]) and number_of(admitted, 1) == 1
        assert process.num_fds() - before - len(flood) <= MAX_PENDING + 8
        for one in flood:
            one.close()


def test_a_flood_displaces_the_connections_of_its_own_address():
    with Listener(["127.0.0.1"], "key") as listener:
        quiet = socket.create_connection(listener.endpoints[0], source_address=("127.0.0.2", 0))
        flood = [socket.create_connection(listener.endpoints[0]) for _ in range(2 * MAX_PENDING)]
        deadline = time.monotonic() + 10
        while len(listener._pending) < MAX_PENDING and time.monotonic() < deadline:
            listener.admit(0.05)
        for _ in range(20):
            listener.admit()
        assert any(one.ip == "127.0.0.2" for one in listener._pending)
        for one in [quiet, *flood]:
            one.close()


def test_the_slow_are_dropped_however_steadily_they_send(monkeypatch):
    monkeypatch.setattr(admission, "PROOF_LIMIT_S", 0.3)
    with serving() as (listener, _), socket.create_connection(listener.endpoints[0], timeout=5) as slow:
        slow.recv(MAX_HELLO_BYTES)
        start = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() < start + 5:
                slow.sendall(b" ")
                time.sleep(0.05)
        assert 0.2 < time.monotonic() - start < 3


def test_a_listener_that_is_out_of_descriptors_makes_room_and_goes_on(monkeypatch):
    class Out:
        """A listening socket at the limit of open files."""

        def accept(self):
            raise OSError(24, os.strerror(24))

    with Listener(["127.0.0.1"], "key") as listener, socket.create_connection(listener.endpoints[0]) as one:
        deadline = time.monotonic() + 5
        while not listener._pending and time.monotonic() < deadline:
            listener.admit(0.05)
        listener._accept(Out())
        assert not listener._pending and one.makefile("rb").readlines()[1:] == []


def test_a_client_tries_each_address_and_gives_up_at_once_where_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as gone:
        nobody = Endpoint(*gone.getsockname())
    start = time.monotonic()
    with pytest.raises(OSError, match=f"127.0.0.1 port {nobody.port}"):
        connect([nobody], "key", {})
    assert time.monotonic() - start < 2
    with serving() as (listener, admitted):
        connect([nobody, *listener.endpoints], "key", {}).close()
        assert number_of(admitted, 1) == 1


def test_a_silent_server_costs_a_client_its_share_of_the_time():
    with socket.create_server(("127.0.0.1", 0)) as silent, serving() as (listener, _):
        endpoints = [Endpoint(*silent.getsockname()), *listener.endpoints]
        connect(endpoints, "key", {}, 2.0).close()


def test_a_line_is_bounded_whole_or_in_parts():
    lines = Lines(10)
    assert lines.feed(b'{"a": 1}\n[2]\n"par') == [{"a": 1}, [2]]
    assert lines and lines.feed(b't"\n') == ["part"]
    assert not lines
    for parts in ([b"x" * 11], [b"1" * 6, b"1" * 6], [b"1\n" + b"2" * 11]):
        with pytest.raises(ValueError, match="a line of more than 10 bytes"):
            for part in parts:
                lines.feed(part)
    with pytest.raises(ValueError, match="nested too deeply"):
        Lines(1 << 20).feed(nested(100_000))


def test_ranks_that_all_connect_before_one_of_them_answers_are_all_admitted():
    """Thousands of busy ranks do: if they were dropped, they would connect again, and again be too late."""
    ranks = MAX_PENDING + 72
    with Listener(["127.0.0.1"], "key", clients=ranks) as listener:
        clients = [socket.create_connection(listener.endpoints[0], timeout=10) for _ in range(ranks)]
        end = time.monotonic() + 10
        while len(listener.descriptors()) < ranks:
            assert not listener.admit(1.0) and time.monotonic() < end
        for number, client in enumerate(clients):
            (challenge,) = Lines(MAX_HELLO_BYTES).feed(client.recv(MAX_HELLO_BYTES))
            hello, challenges = {"rank": number}, (challenge["challenge"], "own")
            shown = admission.proof("key", "client", challenges, hello)
            client.sendall(json_line({"challenge": "own", "hello": hello, "proof": shown}))
        admitted, end = [], time.monotonic() + 10
        while len(admitted) < ranks and time.monotonic() < end:
            admitted += listener.admit(1.0)
        assert {one.hello["rank"] for one in admitted} == set(range(ranks))
        for connection in [*clients, *(one.connection for one in admitted)]:
            connection.close()
