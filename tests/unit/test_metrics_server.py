"""The HTTP server of the metrics: where it listens, whom it serves, what it refuses."""

import socket
import urllib.request
from contextlib import closing

import psutil
import pytest

from horovod_owt.config import resolve
from horovod_owt.errors import ConfigError
from horovod_owt.monitoring import server as server_module
from horovod_owt.monitoring.run_metrics import RunMetrics
from horovod_owt.monitoring.server import MAX_CONNECTIONS, MetricsServer
from horovod_owt.runs.records import Start
from horovod_owt.train.observers import Observers


class Quiet:
    """A heartbeat that hears everybody."""

    def silent(self):
        return []


@pytest.fixture
def metrics(tmp_path):
    return RunMetrics(tmp_path, attempt=1, job_id=None)


@pytest.fixture
def serve(metrics):
    servers = []

    def serve(**where) -> MetricsServer:
        servers.append(MetricsServer(metrics, **{"address": "127.0.0.1", "port": 0, **where}))
        return servers[-1]

    yield serve
    for server in servers:
        server.close()


def scrape(server: MetricsServer) -> str:
    with urllib.request.urlopen(f"http://{server.place}/metrics", timeout=10) as answer:
        return answer.read().decode()


def listening(port: int) -> set[str]:
    """The addresses on which this process listens."""
    connections = psutil.Process().net_connections("tcp")
    return {c.laddr.ip for c in connections if c.status == "LISTEN" and c.laddr.port == port}


def port_of(server: MetricsServer) -> int:
    return int(server.place.rpartition(":")[2])


@pytest.mark.parametrize("address", ["127.0.0.1", "lo"])
def test_only_the_chosen_address_listens(serve, address):
    server = serve(address=address)
    assert "owt_last_step_timestamp_seconds" in scrape(server)
    assert listening(port_of(server)) == {"127.0.0.1"}


def test_ipv6(serve):
    try:
        server = serve(address="::1")
    except ConfigError as error:
        pytest.skip(f"no IPv6 here: {error}")
    assert server.place.startswith("[::1]:") and "owt_steps_total" in scrape(server)


def test_the_port_is_free_again_after_close(metrics):
    first = MetricsServer(metrics, address="127.0.0.1", port=0)
    scrape(first)
    port = port_of(first)
    first.close()
    second = MetricsServer(metrics, address="127.0.0.1", port=port)
    second.close()
    assert listening(port) == set()


@pytest.mark.parametrize(
    ("where", "saw", "fix"),
    [
        ({"address": "127.0.0.1"}, "Address already in use", "--set metrics_port="),
        ({"address": "192.0.2.1"}, "Cannot assign requested address", "--set metrics_address=127.0.0.1"),
        ({"address": "no such interface"}, "no such interface", "--set metrics_address=127.0.0.1"),
    ],
)
def test_an_address_that_cannot_be_had_is_one_line(serve, where, saw, fix):
    port = port_of(serve())
    with pytest.raises(ConfigError) as caught:
        serve(port=port, **where)
    assert saw in str(caught.value) and fix in caught.value.fix and "\n" not in str(caught.value)


def test_clients_that_say_nothing_do_not_keep_others_out(serve, monkeypatch):
    server = serve()
    place = ("127.0.0.1", port_of(server))
    held = [socket.create_connection(place) for _ in range(2 * MAX_CONNECTIONS)]
    assert "owt_steps_total" in scrape(server)
    closed = 0
    for one in held:
        one.settimeout(0.01)
        try:
            closed += one.recv(1) == b""
        except TimeoutError:
            pass
        one.close()
    assert closed >= MAX_CONNECTIONS  # the oldest were displaced


def test_a_client_that_is_slow_is_dropped(serve, monkeypatch):
    monkeypatch.setattr(server_module._Handler, "timeout", 0.1)
    server = serve()
    with closing(socket.create_connection(("127.0.0.1", port_of(server)))) as slow:
        slow.sendall(b"GET /met")
        slow.settimeout(10)
        assert slow.recv(100) == b""


def open_observers(run_dir, *, resumes: bool, **settings) -> Observers:
    cfg = resolve("quickstart", [f"{key}={value}" for key, value in settings.items()])
    observers = Observers()
    where = {"step": 5 * resumes, "total_steps": 10, "checkpoint_steps": 5}
    observers.open(cfg, run_dir, Start(), **where, heartbeat=Quiet(), resumes=resumes)
    return observers


def test_a_port_in_use_refuses_a_new_run_and_warns_a_resumed_one(serve, tmp_path, caplog):
    port = port_of(serve())
    with pytest.raises(ConfigError, match="already in use"):
        open_observers(tmp_path, resumes=False, metrics_port=port, tensorboard="never")
    observers = open_observers(tmp_path, resumes=True, metrics_port=port, tensorboard="never")
    observers.close()
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith(f"no metrics: metrics_port={port}")


@pytest.mark.parametrize(
    ("package", "settings"),
    [("prometheus_client", {"metrics_port": 9400}), ("tensorboard", {"tensorboard": "always"})],
)
def test_a_missing_package_is_named_with_the_way_to_get_it(tmp_path, monkeypatch, package, settings):
    monkeypatch.setattr("horovod_owt.train.observers.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        open_observers(tmp_path, resumes=False, **settings)
    assert package in caught.value.saw and 'pip install "horovod_owt[metrics]"' in caught.value.fix
    open_observers(tmp_path, resumes=False, tensorboard="auto").close()  # without it
    assert not (tmp_path / "tensorboard").exists()
