"""The rendezvous store of a job: for its ranks only, whatever strangers send, and on one address."""

import base64
import json
import os
import pickle
import random
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import psutil
import pytest
from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
from horovod.runner.elastic.rendezvous import create_rendezvous_handler
from horovod.runner.http.http_client import put_data_into_kvstore, read_data_from_kvstore

from horovod_owt.parallel import gloo
from horovod_owt.parallel.gloo import Node, rendezvous_environment, rendezvous_host
from horovod_owt.parallel.store import MAX_PENDING, Store, start_rendezvous
from horovod_owt.runs.owner import elastic_driver


@pytest.fixture
def store():
    """(address, port) as ranks get them."""
    address, port, stop = start_rendezvous([Node("here", 2)], "127.0.0.1")
    yield address, port
    stop()


def status(url: str, data: bytes | None = None, method: str | None = None) -> int | str:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=data, method=method), timeout=5) as got:
            return got.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return "refused"


def raw(port: int, sent: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
        try:
            stranger.sendall(sent)
            stranger.shutdown(socket.SHUT_WR)
            return stranger.recv(1000)
        except OSError:
            return b""


def test_horovods_own_client_gets_what_another_put(store):
    put_data_into_kvstore(*store, "global", "1", ("value", 7))
    assert read_data_from_kvstore(*store, "global", "1") == ("value", 7)


@pytest.fixture
def answered():
    """Whether a server of two ranks, in which the first has put b"an address", answers at once, and what."""
    store = Store("127.0.0.1")
    port = store.start()
    store.init(get_host_assignments(parse_hosts("here:2"), 2))
    address = store.address("127.0.0.1", port)
    put_data_into_kvstore(address, port, "global", "0", "an address")

    def answered(key: str, secret: str = address.partition("/")[2], cut: int | None = None) -> bytes | None:
        rank, request = socket.socketpair()
        with rank, request:
            rank.sendall(f"GET /{secret}:{port}/{key} HTTP/1.1\r\nContent-Length: 0\r\n\r\n".encode()[:cut])
            return rank.recv(1000) if store._httpd._answered(request) else None

    yield answered
    store.stop()


def test_a_rank_that_asks_for_an_address_is_answered_without_a_thread(answered):
    """If its question has arrived whole, and none that the driver of an elastic job may answer late."""
    found = answered("global/0")
    assert found.startswith(b"HTTP/1.0 200 OK\r\nContent-Length: ") and b"an address" in base64.b64decode(
        found.partition(b"\r\n\r\n")[2]
    )
    assert answered("global/1") == b"HTTP/1.0 404 Not Found\r\nContent-Length: 0\r\n\r\n"
    assert answered("global/0", cut=-1) is answered("global/0", "00") is answered("rank_and_size/0") is None


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "HEAD", "POST"])
def test_without_the_secret_nothing_is_read_written_or_deleted(store, method):
    address, port = store
    put_data_into_kvstore(address, port, "extra", "1", "mine")
    data = b"theirs" if method in ("PUT", "POST") else None
    for path in ("extra/1", f"{'0' * 32}/extra/1", "/extra/1", f":{port}/extra/1", "../extra/1", ""):
        assert status(f"http://127.0.0.1:{port}/{path}", data, method) == "refused"
    assert read_data_from_kvstore(address, port, "extra", "1") == "mine"


def test_a_stopped_store_no_longer_listens():
    _, port, stop = start_rendezvous([Node("here", 1)], "127.0.0.1")
    stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_it_listens_on_the_address_it_is_given(store):
    listening = [c for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert [c.laddr.ip for c in listening if c.laddr.port == store[1]] == ["127.0.0.1"]


def test_the_driver_of_an_elastic_job_unpickles_nothing_of_a_stranger(tmp_path):
    """What Horovod's own does: whoever reaches its port runs code there."""

    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    harm = base64.b64encode(pickle.dumps(Harm()))
    store = Store("127.0.0.1")
    port = store.start(create_rendezvous_handler(None))
    store.init([])
    try:
        assert status(f"http://127.0.0.1:{port}/worker_addresses/here:0", harm, "PUT") == "refused"
        assert not (tmp_path / "harm").exists()
        # the same with the secret is unpickled: the test would see it
        status(f"http://{store.address('127.0.0.1', port)}:{port}/worker_addresses/here:0", harm, "PUT")
        assert (tmp_path / "harm").exists()
    finally:
        store.stop()


def test_a_flood_garbage_and_floods_of_bytes_leave_it_serving_and_small(store):
    _, port = store
    draw, process = random.Random(7), psutil.Process()
    put_data_into_kvstore(*store, "extra", "1", "mine")
    before = process.memory_info().rss
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(3 * MAX_PENDING)]
    assert read_data_from_kvstore(*store, "extra", "1") == "mine"
    for _ in range(100):
        raw(port, draw.randbytes(draw.randrange(1, 3000)))
    for head in (b"GET /", b"PUT /extra/1 HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n", b"\r\n" * 100):
        raw(port, head + bytes(4 << 20))
    assert read_data_from_kvstore(*store, "extra", "1") == "mine"
    assert process.memory_info().rss - before < 50 << 20
    for one in silent:
        one.close()


def test_a_value_of_a_rank_is_bounded_too(store):
    address, port = store
    assert raw(port, f"PUT /{address.partition('/')[2]}:{port}/a/b HTTP/1.1\r\n".encode()) == b""
    big = f"PUT /{address.partition('/')[2]}:{port}/a/b HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n"
    assert b" 400 " in raw(port, big.encode())


def test_the_secret_is_neither_in_what_a_run_folder_shows_nor_taken_for_a_host():
    env = rendezvous_environment("10.0.0.1:4711/0123secret", 4711)
    assert rendezvous_host(env) == "10.0.0.1" and rendezvous_host({**env, gloo.ADDRESS: "n1"}) == "n1"
    assert elastic_driver({**env, "HOROVOD_ELASTIC": "1"}) == "10.0.0.1:4711:4711"


GUARDED = """
import json, os
from types import SimpleNamespace
from horovod.runner import gloo_run
from horovod.runner.common.util import network, secret
from horovod_owt.parallel.store import guard_launcher
guard_launcher("lo")
port = gloo_run.RendezvousServer(0).start()
command = gloo_run.get_run_command(["owt"], "127.0.0.1", ["lo"], port)
place = dict(rank=0, size=1, local_rank=0, local_size=1, cross_rank=0, cross_size=1)
gloo_run.network.resolve_host_address = {"here": "127.0.0.1", "there": "192.0.2.77"}.get
start = gloo_run._slot_info_to_command_fn(command, {**os.environ, "HOROVOD_CYCLE_TIME": "5"})
print(json.dumps({
    "address": os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"],
    "port": port,
    "here": start(SimpleNamespace(hostname="here", **place)),
    "there": start(SimpleNamespace(hostname="there", **place)),
    "service": network.BasicService("s", secret.make_secret_key(), ["lo"])._server.server_address[0],
}), flush=True)
os._exit(0)
"""


def test_horovodrun_started_by_us_guards_its_store_and_its_services():
    """In a process of its own, whose Horovod is changed."""
    env = {**os.environ, "MY_TOKEN": "of another service"}
    done = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, timeout=60, env=env)
    said = json.loads(done.stdout)
    address = f"HOROVOD_GLOO_RENDEZVOUS_ADDR={said['address']} "
    assert said["address"].startswith(f"127.0.0.1:{said['port']}/") and said["service"] == "127.0.0.1"
    assert address in said["there"] and "MY_TOKEN='of another service'" in said["there"]
    # its shell's command line, which all users of the host see
    assert address not in said["here"] and "MY_TOKEN" not in said["here"]
    for command in (said["here"], said["there"]):
        assert (
            f"HOROVOD_GLOO_RENDEZVOUS_PORT={said['port']} " in command and "HOROVOD_CYCLE_TIME=5" in command
        )
        assert "HOROVOD_GLOO_IFACE=lo" in command and command.endswith(" owt")


def test_threads_of_strangers_do_not_keep_the_process(store):
    with socket.create_connection(("127.0.0.1", store[1])) as silent:
        silent.sendall(b"GET")
        put_data_into_kvstore(*store, "extra", "2", "later")
        assert not [t for t in threading.enumerate() if "process_request" in t.name and not t.daemon]
