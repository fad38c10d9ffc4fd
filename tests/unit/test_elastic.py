"""What an elastic job makes of its number of ranks, and of places on one box."""

import shlex
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from horovod.common.elastic import run_fn
from horovod.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt
from horovod.runner.elastic.worker import HostUpdateResult
from horovod.runner.http import http_client
from hypothesis import given
from hypothesis import strategies as st

from horovod_owt.config import TrainConfig
from horovod_owt.errors import ConfigError
from horovod_owt.launch.elastic import DISCOVER_HOSTS, ElasticJob
from horovod_owt.parallel import elastic
from horovod_owt.parallel.runtime import World
from horovod_owt.runs.opening import Opened, Resume
from horovod_owt.topology import LOOPBACK_SLOTS, loopback_hosts, read_topology
from horovod_owt.train import elastic as train_elastic
from horovod_owt.train.elastic import config_for_world


def config(batch=32, accum_steps=1, elastic_batch="keep") -> TrainConfig:
    return TrainConfig(batch=batch, accum_steps=accum_steps, elastic_batch=elastic_batch)


@pytest.mark.parametrize(
    ("ranks", "batch", "accum_steps"),
    [(4, 32, 1), (2, 32, 2), (1, 32, 4), (8, 16, 1), (5, 26, 1), (3, 22, 2)],
)
def test_with_keep_the_global_batch_is_divided_among_the_new_ranks(ranks, batch, accum_steps):
    """128 images, and the nearest number that 3 or 5 ranks can share."""
    kept = config_for_world(ranks, config(), 128)
    assert (kept.batch, kept.accum_steps) == (batch, accum_steps)


@pytest.fixture
def rank_0_in_worlds(monkeypatch, tmp_path):
    """Runs rank 0 in worlds of these sizes, in none of which anything is committed; the global batches."""

    def train(cfg, sizes, agree=lambda *_: None):
        left, seen = iter(sizes), []

        class Run:
            def __init__(self, cfg, request, world, *_, **__) -> None:
                seen.append(cfg.global_batch(world.size))

            def train(self) -> None:
                """No step."""

        def current_world(device):
            return World(0, next(left), 0, 1, "here", torch.device("cpu"), 1)

        runtime = {"init": lambda *_, **__: None, "current_world": current_world, "shutdown": lambda: None}
        alone = {
            "runtime": SimpleNamespace(**runtime),
            "Run": Run,
            "check_agreement": agree,
            "broadcast_object": lambda value, name, kind: value,
            "on_root": lambda action, name, kind: action(),
            "open_run": lambda *_: Opened(tmp_path),
        }
        for name, stand_in in alone.items():
            monkeypatch.setattr(train_elastic, name, stand_in)
        monkeypatch.setattr(elastic, "run", lambda state, train: [train(state) for _ in sizes])
        folder = SimpleNamespace(fingerprint=lambda: "", identity=dict)
        request = SimpleNamespace(cfg=cfg, device=SimpleNamespace(name="cpu"), folder=folder)
        train_elastic.train_elastic(request, run_dir=tmp_path, resume=Resume())
        return seen

    return train


@pytest.mark.parametrize(
    ("elastic_batch", "global_batches"), [("keep", [128, 132, 128]), ("scale", [128, 96, 128])]
)
def test_the_first_ranks_determine_the_global_batch_also_if_one_dies_before_the_first_commit(
    rank_0_in_worlds, elastic_batch, global_batches
):
    assert rank_0_in_worlds(config(elastic_batch=elastic_batch), [4, 3, 4]) == global_batches


@pytest.mark.parametrize(("agreed_before", "ends"), [(0, ConfigError), (1, HorovodInternalError)])
def test_a_rank_that_joins_with_other_versions_does_not_end_the_job(
    rank_0_in_worlds, caplog, agreed_before, ends
):
    """As after an update of the environment: the others regroup, and it ends, as all do at the start."""
    answers = iter([None] * agreed_before + [ConfigError("ranks disagree on version").on_every_rank()])

    def agree(*_):
        if error := next(answers):
            raise error

    with pytest.raises(ends, match="ranks disagree on version"):
        rank_0_in_worlds(config(), [2, 3], agree)
    assert ("ranks that joined are refused: ranks disagree on version" in caplog.text) == bool(agreed_before)


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 256), st.integers(1, 4))
def test_with_keep_the_global_batch_is_exact_where_it_can_be(before, now, batch, accum_steps):
    cfg = config(batch, accum_steps)
    first = cfg.global_batch(before)
    kept = config_for_world(now, cfg, first)
    assert kept.batch <= batch
    if first % now == 0 and first // now % kept.accum_steps == 0:
        assert kept.global_batch(now) == first
        assert kept.peak_lr(now) == pytest.approx(cfg.peak_lr(before))


def test_with_batch_normalisation_a_share_has_two_images(caplog):
    cfg = TrainConfig(batch=4, elastic_batch="keep", model="alexnet-owt-bn")
    assert config_for_world(8, cfg, 8).batch == 2 and "global batch 16 instead of 8" in caplog.text
    assert config_for_world(8, config(4), 8).batch == 1


def test_with_scale_the_configuration_is_unchanged():
    scaled = config(elastic_batch="scale")
    assert config_for_world(3, scaled, 128) is scaled


def test_each_place_on_a_box_is_a_host_of_its_own_to_horovod_and_a_local_rank_to_us():
    hosts = loopback_hosts(3)
    assert len(set(hosts)) == 3 and {socket.gethostbyname(host) for host in hosts} == {"127.0.0.1"}
    for place, host in enumerate(hosts):
        env = {f"HOROVOD_{name}": "0" for name in ("RANK", "LOCAL_RANK")}
        env |= {"HOROVOD_SIZE": "3", "HOROVOD_LOCAL_SIZE": "1", "HOROVOD_HOSTNAME": host, LOOPBACK_SLOTS: "3"}
        topology = read_topology(env)
        assert (topology.local_rank, topology.local_size) == (place, 3)
        assert topology.host == socket.gethostname()
    env["HOROVOD_HOSTNAME"] = "node7"
    assert (read_topology(env).local_rank, read_topology(env).host) == (0, "node7")


def test_a_path_with_spaces_and_quotes_reaches_the_discovery_script_whole():
    job = ElasticJob(["DATA"], interface="eth0", hosts_file=Path("/my runs/it's; rm"), min_ranks=2)
    argv = job.argv()
    (script,) = [word for before, word in zip(argv, argv[1:], strict=False) if before.endswith("script")]
    assert shlex.split(script) == ["sh", str(DISCOVER_HOSTS), "/my runs/it's; rm"]
    assert "--max-np" not in argv and argv[-3:] == ["owt", "train", "DATA"]


@pytest.mark.parametrize("update", [HostUpdateResult.removed, HostUpdateResult.added, HostUpdateResult.mixed])
def test_a_commit_says_that_hosts_changed(monkeypatch, update):
    monkeypatch.setattr(elastic, "broadcast_object", lambda value, name: value)
    state = elastic.ElasticState(torch.device("cpu"))
    assert state.commit_copy({}, None) is False
    state.on_hosts_updated(1.0, update)
    assert state.commit_copy({}, None) is True
    assert state.commit_copy({}, None) is False


def test_hosts_that_change_while_ranks_regroup_are_not_forgotten(monkeypatch):
    """Two places of a box come back within seconds, and the second one while the first one's rank starts."""
    monkeypatch.setattr(elastic, "broadcast_object", lambda value, name: value)
    monkeypatch.setattr(elastic, "abort_connections", lambda *, keep: None)
    worlds, seen = iter(range(3)), []

    def train(state):
        seen.append(state.commit_copy({}, None))
        world = next(worlds)
        if world == 0:
            raise HostsUpdatedInterrupt(skip_sync=True)
        if world == 1:
            state.on_hosts_updated(2.0, HostUpdateResult.added)  # before the next world's hosts are chosen
            raise HorovodInternalError

    def regroup():
        if len(seen) == 1:
            state.on_hosts_updated(1.0, HostUpdateResult.added)

    state = elastic.ElasticState(torch.device("cpu"))
    monkeypatch.setattr(state, "sync", lambda: None)
    run_fn(train, regroup)(state)
    assert seen == [False, True, False]


def test_ranks_that_regroup_synchronise():
    """Horovod's would not after a removal, and a host that joins meanwhile would wait for them for ever."""
    with pytest.raises(HostsUpdatedInterrupt) as interrupt:
        elastic.regroup()
    assert interrupt.value.skip_sync is False


def test_no_rank_keeps_a_commit_that_rank_0_has_not_recorded(monkeypatch):
    def rank_0_died(value, name):
        raise HorovodInternalError

    state = elastic.ElasticState(torch.device("cpu"))
    monkeypatch.setattr(elastic, "broadcast_object", lambda value, name: value)
    state.commit_copy({"w": torch.ones(2)}, "first")
    monkeypatch.setattr(elastic, "broadcast_object", rank_0_died)
    with pytest.raises(HorovodInternalError):
        state.commit_copy({"w": torch.zeros(2)}, "second")
    assert state.last == "first" and state.tensors["w"].all()


def test_a_rank_whose_collective_failed_lets_the_others_know(monkeypatch):
    """Also while ranks regroup: rank 2 may wait for rank 1, which heard that rank 0 is gone."""
    kept = []
    monkeypatch.setattr(elastic, "abort_connections", lambda *, keep: kept.append(keep))
    elastic.ElasticState(torch.device("cpu")).restore()
    assert kept == [set()]


def test_a_commit_keeps_nothing_of_an_earlier_one(monkeypatch):
    """Else the errors of a world of two ranks would come back after one that has made up for them."""
    state = elastic.ElasticState(torch.device("cpu"))
    monkeypatch.setattr(state, "check_host_updates", lambda: None)
    state.commit_copy({"w": torch.ones(2), "owner_error.w": torch.ones(2)}, None)
    state.commit_copy({"w": torch.zeros(2)}, None)
    assert state.tensors.keys() == {"w"} and not state.tensors["w"].any()


def test_a_rank_reaches_the_driver_past_a_proxy(monkeypatch):
    """Its first word to the driver is an HTTP request; a cluster's http_proxy does not know the nodes."""
    arrived = []

    class Driver(BaseHTTPRequestHandler):
        def do_PUT(self):
            arrived.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY", "HOROVOD_GLOO_IFACE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(http_client, "urlopen", http_client.urlopen)  # restored afterwards
    with HTTPServer(("127.0.0.1", 0), Driver) as driver:
        threading.Thread(target=driver.serve_forever, daemon=True).start()
        where = ["127.0.0.1", driver.server_port, "worker_addresses", "n1:0", "address and key"]
        say = lambda train: lambda state: http_client.put_data_into_kvstore(*where)  # noqa: E731
        monkeypatch.setattr(elastic.hvd.elastic, "run", say)
        elastic.run(None, None)
        driver.shutdown()
    assert arrived == ["/worker_addresses/n1:0"]
