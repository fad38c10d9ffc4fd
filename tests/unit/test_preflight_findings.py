"""What preflight makes of what ranks say, and its probes where one process can be both ends."""

import itertools
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pytest
from answers import on_hosts

from horovod_owt.errors import ConfigError, RunError
from horovod_owt.parallel import interfaces
from horovod_owt.parallel.admission import Listener
from horovod_owt.preflight import dataset, host, network, wire
from horovod_owt.preflight.findings import Answer, agreement, spans, who
from horovod_owt.preflight.probes import within
from horovod_owt.preflight.wire import Pair
from horovod_owt.topology import read_topology

GOOD_PAIR = Pair(latency_s=1e-4, up_bytes_per_s=1e9, down_bytes_per_s=1.1e9)


def changed(pair=GOOD_PAIR, **values):
    return Pair(**{**pair.__dict__, **values})


def test_ranks_are_listed_by_host_in_ranges():
    assert spans([7, 0, 1, 2, 9, 10]) == "0-2, 7, 9-10"
    assert who(on_hosts(*range(5), ranks_each=4)) == "h0 (ranks 0-3), h1 (rank 4)"


def test_a_host_with_another_version_is_named_and_equal_ones_are_listed_once():
    answers = on_hosts(*[{"torch": "2.14.1", "python": "3.11"} for _ in range(6)], ranks_each=2)
    answers[4].value["torch"] = answers[5].value["torch"] = "2.13.0"
    del answers[1].value["python"]
    torch, python = agreement("versions", answers, fix="the same")
    assert (torch.check, torch.ok, torch.hosts) == ("versions: torch", False, ("h2",))
    assert torch.saw == "2.14.1 on h0 (ranks 0-1), h1 (ranks 2-3); 2.13.0 on h2 (ranks 4-5)"
    assert "none on h0 (rank 1)" in python.saw
    (good,) = agreement("versions", answers[2:4], fix="the same")
    assert (good.ok, good.saw) == (True, "torch 2.14.1, python 3.11")


@pytest.mark.parametrize("hosts", [2, 3, 7, 8])
def test_rounds_have_each_pair_once_and_no_host_twice_at_a_time(hosts):
    names = [f"h{number}" for number in range(hosts)]
    rounds = list(network.rounds(names))
    pairs = [frozenset(pair) for round_ in rounds for pair in round_]
    assert sorted(map(sorted, pairs)) == sorted(map(list, itertools.combinations(names, 2)))
    for round_ in rounds:
        met = list(itertools.chain(*round_))
        assert len(met) == len(set(met))


@pytest.mark.parametrize(
    ("slow", "flagged"),
    [
        ({}, []),
        ({("a", "b"): {"down_bytes_per_s": 0.4e9}}, [("a", "b")]),
        (
            {("a", "c"): {"up_bytes_per_s": 0.4e9}, ("b", "c"): {"up_bytes_per_s": 0.4e9}},
            [("a", "c"), ("b", "c")],
        ),
        ({("b", "c"): {"latency_s": 2e-3}}, [("b", "c")]),
        ({("b", "c"): {"latency_s": 3e-4}}, []),  # thrice the usual, but nobody would notice
    ],
)
def test_a_slow_link_is_found_also_where_most_pairs_have_it(slow, flagged):
    pairs = {pair: changed(**slow.get(pair, {})) for pair in itertools.combinations("abc", 2)}
    assert network.slow_pairs(pairs) == flagged
    findings = network.judge_pairs(pairs, 3)
    assert [finding.hosts for finding in findings if not finding.ok] == flagged
    assert flagged or findings[0].saw.startswith("3 pairs of hosts; usual: 1.1 GB/s and 100 us")


def test_a_host_all_of_whose_links_are_slow_both_ways_is_found():
    both = dict(up_bytes_per_s=1e7, down_bytes_per_s=1e7)
    pairs = {("a", "b"): GOOD_PAIR, ("a", "c"): changed(**both), ("b", "c"): changed(**both)}
    assert network.slow_pairs(pairs) == [("a", "c"), ("b", "c")]


@pytest.mark.parametrize(("slower", "flagged"), [(2.2e9, []), (1.4e9, [("a", "c")])])
def test_no_core_is_taken_for_a_slow_link(slower, flagged):
    """Two hosts of a virtual network that share a core had 2.2 GB/s where others had 5."""
    fast = dict(up_bytes_per_s=5e9, down_bytes_per_s=5e9)
    pairs = {pair: changed(**fast) for pair in itertools.combinations("abc", 2)}
    pairs["a", "c"] = changed(**fast | dict(up_bytes_per_s=slower))
    assert network.slow_pairs(pairs) == flagged


def test_a_latency_counts_against_that_of_the_others():
    """Over a network whose usual latency anybody would notice."""
    pairs = {pair: changed(latency_s=1e-3) for pair in itertools.combinations("abc", 2)}
    assert network.slow_pairs(pairs | {("b", "c"): changed(latency_s=1.9e-3)}) == []
    assert network.slow_pairs(pairs | {("b", "c"): changed(latency_s=2.1e-3)}) == [("b", "c")]


def test_a_clock_that_is_off_is_reported_against_that_of_rank_0():
    (good,) = network.judge_clocks(on_hosts(1e-3, -2e-3), "n0")
    assert good.ok and good.saw == "h1 +0.002 s against n0, the largest of 2"
    (bad,) = network.judge_clocks(on_hosts(1e-3, 7.0), "n0")
    assert (bad.ok, bad.hosts, bad.saw) == (False, ("h1",), "h1 -7 s against n0")
    (bad,) = network.judge_clocks(on_hosts(1e-3, -7.0), "n0")
    assert (bad.ok, bad.hosts) == (False, ("h1",))


def test_two_hosts_with_one_name_are_reported():
    assert host.judge_addresses(on_hosts(["10.0.0.1"], ["10.0.0.2"])) == []
    (bad,) = host.judge_addresses([Answer(0, "clone", ["10.0.0.1"]), Answer(4, "clone", ["10.0.0.2"])])
    assert not bad.ok and "2 hosts are named clone: 10.0.0.1; 10.0.0.2" in bad.saw


def test_the_wire_measures_a_real_connection_and_two_clocks_of_one_host(monkeypatch):
    with wire.answering("127.0.0.1", "key") as port:
        pair = wire.measure("127.0.0.1", port, "key")
        latency_s, offset_s = wire.ping("127.0.0.1", port, "key")
        monkeypatch.setattr(wire, "LIMIT_S", 0.5)
        with pytest.raises(OSError, match="no answer at 127.0.0.1"):
            wire.ping("127.0.0.1", port, "another job's key")
    assert abs(offset_s) <= latency_s + 1e-3
    assert 0 < pair.latency_s < 0.1
    assert pair.up_bytes_per_s > 1e6 and pair.down_bytes_per_s > 1e6
    with pytest.raises(OSError):
        wire.measure("127.0.0.1", port, "key")  # nobody answers any more
    with pytest.raises(RunError, match="n2 is not reachable at 127.0.0.1"):
        network.measure("n2", ["127.0.0.1", port], "key")


def test_strangers_do_not_delay_a_measurement():
    with wire.answering("127.0.0.1", "key") as port:
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(200)]
        with suppress(OSError):  # dropped meanwhile
            silent[-1].sendall(bytes(1 << 20))
        start = time.perf_counter()
        wire.ping("127.0.0.1", port, "key")
        assert time.perf_counter() - start < 2
        for one in silent:
            one.close()


def test_a_slow_receiver_is_measured_as_slow():
    """What counts is what arrives, not what a sender's buffers take."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        there = socket.create_connection(listener.getsockname())
        here, _ = listener.accept()
        start = time.perf_counter()

        def trickle():
            for _ in range(20):
                there.sendall(bytes(50_000))
                time.sleep(0.01)
            there.close()

        threading.Thread(target=trickle).start()
        rate = wire._receive_rate(here)
        here.close()
    assert rate <= 1e6 / 0.15 and time.perf_counter() - start >= 0.2


def test_a_ring_moves_bytes_through_every_rank():
    with ThreadPoolExecutor(3) as ranks:
        listeners = [Listener(["127.0.0.1"], "key") for _ in range(3)]
        places = [listener.endpoints[0] for listener in listeners]
        rates = list(ranks.map(wire.ring_rate, listeners, [*places[1:], places[0]]))
        for listener in listeners:
            listener.close()
    assert len(rates) == 3 and min(rates) > 1e6


def test_an_allreduce_far_below_the_ring_is_bad():
    moved = on_hosts(2e9, 1e9)
    bytes_on_the_bus = network.ALLREDUCE_BYTES  # 2 (n-1)/n of them, for n = 2
    slowest = network.RING_SHARE * 1e9
    assert network.judge_ring(moved, on_hosts(0.9 * bytes_on_the_bus / slowest, 1e-3)).ok
    bad = network.judge_ring(moved, on_hosts(1.1 * bytes_on_the_bus / slowest, 1e-3))
    assert not bad.ok and bad.hosts == ("h1",)


def test_interfaces_that_lead_nowhere_or_differ_are_bad():
    alike = {"name": "eth0", "address": "a", "mtu": 1500, "mbit_per_s": 10000}
    assert network.judge_interfaces(on_hosts(alike, alike))[0].ok
    (docker,) = network.judge_interfaces(on_hosts(alike, {**alike, "name": "docker0"}))
    assert (docker.ok, docker.hosts) == (False, ("h1",))
    speed, mtu = sorted(
        network.judge_interfaces(on_hosts(alike, alike, {**alike, "mtu": 9000, "mbit_per_s": None})),
        key=lambda finding: finding.check, reverse=True,
    )  # fmt: skip
    assert mtu.saw == "1500 bytes on h0 (rank 0), h1 (rank 1); 9000 bytes on h2 (rank 2)"
    assert "unknown Mbit/s on h2" in speed.saw and speed.hosts == mtu.hosts == ("h2",)


def test_the_interface_that_is_set_for_the_job_is_the_one_measured(monkeypatch, tmp_path):
    here = {"lo": "127.0.0.1", "eth0": "10.0.0.1", "ib0": "10.1.0.1"}
    table = {name: [SimpleNamespace(family=socket.AF_INET, address=ip)] for name, ip in here.items()}
    monkeypatch.setattr(interfaces.psutil, "net_if_addrs", lambda: table)
    hosts = {"127.0.0.1": ["10.0.0.1"]}
    for variable in ("HOROVOD_GLOO_IFACE", "OMPI_MCA_btl_tcp_if_include"):  # horovodrun; owt launch mpirun
        found = network.interface(hosts, {variable: "ib0"}, tmp_path)
        assert (found["name"], found["address"]) == ("ib0", "10.1.0.1")
    assert network.interface(hosts, {}, tmp_path)["name"] == "lo"
    with pytest.raises(ConfigError, match="ib1; wanted one of eth0, ib0, lo"):
        network.interface(hosts, {"HOROVOD_GLOO_IFACE": "ib1", "NCCL_SOCKET_IFNAME": "eth0"}, tmp_path)


LIMITS = {
    "files": 4096,
    "locked_bytes": 65536,
    "infiniband": False,
    "shm_bytes": 4e9,
    "cores": [0, 1],
    "cpu_quota": None,
    "local_size": 2,
}


@pytest.mark.parametrize(
    ("change", "bad"),
    [
        ({}, []),
        ({"files": 100}, ["open files"]),
        ({"files": -1}, []),  # RLIM_INFINITY
        ({"infiniband": True}, ["locked memory"]),
        ({"infiniband": True, "locked_bytes": -1}, []),
        ({"shm_bytes": 400e6}, ["/dev/shm"]),  # for two ranks
        ({"shm_bytes": None}, []),  # no limit
        ({"cores": [0]}, ["cores"]),
        ({"cpu_quota": 1.5}, ["cores"]),
        ({"cpu_quota": 2.0}, []),
    ],
)
def test_limits_that_are_too_low_are_found_on_their_host(change, bad):
    answers = on_hosts(LIMITS, LIMITS, {**LIMITS, **change}, {**LIMITS, **change}, ranks_each=2)
    findings = [finding for finding in host.judge_limits(answers, 4) if not finding.ok]
    assert [finding.check for finding in findings] == bad
    assert all(finding.hosts == ("h1",) and finding.fix for finding in findings)


def test_an_unlimited_shm_and_a_driver_without_a_card_are_no_faults(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "free_space", lambda _: (None, None))  # a tmpfs of size=0
    monkeypatch.setattr(host, "INFINIBAND", tmp_path)
    (tmp_path / "rdma_cm").touch()
    found = host.limits(read_topology({}))
    assert (found["shm_bytes"], found["infiniband"]) == (None, False)
    (tmp_path / "uverbs0").touch()
    assert host.limits(read_topology({}))["infiniband"]


def test_ranks_that_were_bound_to_a_core_each_have_enough():
    answers = on_hosts({**LIMITS, "cores": [0]}, {**LIMITS, "cores": [1]}, ranks_each=2)
    assert all(finding.ok for finding in host.judge_limits(answers, 2))


def test_names_that_do_not_resolve_or_resolve_elsewhere_are_reported_with_the_hosts(monkeypatch):
    """Every host has 127.0.0.1, and many 172.17.0.1 (Docker): such an address tells no host from another."""
    resolved = {
        "n1": "127.0.1.1",  # Debian's /etc/hosts has a host's own name so
        "n2": "10.0.0.2",
        "n4": "10.0.0.9",
        "n5": "127.0.1.1",  # and clones may have that of the host that they are copies of
        "localhost": "127.0.0.1",
    }

    def getaddrinfo(name, *_, **__):
        if name not in resolved:
            raise OSError(-2, "Name or service not known")
        return [(socket.AF_INET, None, 0, "", (resolved[name], 0))]

    monkeypatch.setattr(host.socket, "getaddrinfo", getaddrinfo)
    table = {f"n{n}": [f"10.0.0.{n}", "172.17.0.1", "127.0.0.1"] for n in range(1, 6)}
    table |= {"localhost": ["10.0.0.7", "127.0.0.1"]}  # horovodrun's name for its own host
    troubles = host.names(table, "n1")
    assert troubles == {
        "n3": "does not resolve: Name or service not known",
        "n4": "resolves to 10.0.0.9, which is not its address",
        "n5": "resolves to the loopback address 127.0.1.1",
    }
    assert set(host.names({"n4": table["n4"], "n5": table["n5"]}, "n4")) == {"n4", "n5"}
    assert set(host.names({"n4": table["n4"], "n5": table["n5"]}, "n5")) == {"n4"}
    bad = host.judge_names(on_hosts(troubles, {"n3": troubles["n3"]}))
    assert [finding.hosts for finding in bad] == [("n3",), ("n4",), ("n5",)]
    assert "seen from h0, h1" in bad[0].saw


def test_a_data_set_that_differs_and_a_slow_disk_are_found():
    good = {"fingerprint": "48 images", "images_per_s": 1000.0, "bytes_per_s": 1e8}
    good |= {"cache_bytes": 3 * 10**9, "cache_room": 4 * 10**9}
    assert all(finding.ok for finding in dataset.judge_data(on_hosts(good, good)))
    other = {**good, "fingerprint": "47 images"}
    slow = {**good, "images_per_s": 400.0, "cache_room": 10**9}
    findings = dataset.judge_data(on_hosts(good, other, good, slow))
    assert {f.check: f.hosts for f in findings if not f.ok} == {"data: set": ("h1",), "read rate": ("h3",)}
    assert findings[-1].saw.startswith("does not fit: about 3.0 GB of decoded images at 256 px")
    assert findings[-1].saw.endswith("has room for 1.0 GB on h3")


def test_a_real_data_set_is_read(tmp_path, monkeypatch):
    from horovod_owt.data.synthetic import write_synthetic

    write_synthetic(tmp_path / "data", classes=2, train_per_class=3, val_per_class=1, size=(32, 32))
    monkeypatch.setattr(dataset, "READ_S", 0.2)
    found = dataset.read(tmp_path / "data", seed=1)
    size = sum(path.stat().st_size for path in (tmp_path / "data" / "train").glob("*/*"))
    assert found["images_per_s"] > 6  # a small set is read again and again
    assert found["bytes_per_s"] / found["images_per_s"] == pytest.approx(size / 6, rel=0.01)
    assert found["fingerprint"].startswith("6 + 2 images of 2 classes")
    assert 8 * 3 * 32 * 32 < found["cache_bytes"] < 2**25


def test_a_run_folder_is_tried_where_it_will_be_and_left_as_it_was(tmp_path):
    run_dir = tmp_path / "runs" / "first"
    dataset.leave_token(run_dir, "t")
    seen = dataset.try_folder(run_dir, "t", rank=0)
    dataset.take_token(run_dir, "t")
    assert (seen["folder"], seen["error"], seen["shared"]) == (str(tmp_path), "", True)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_seen_late_is_seen(tmp_path):
    late = threading.Timer(0.3, dataset.leave_token, (tmp_path, "t"))
    late.start()
    assert dataset.try_folder(tmp_path, "t", rank=1)["shared"]
    late.join()


def test_a_folder_that_is_closed_full_or_not_shared_is_bad(monkeypatch):
    good = {"folder": "/runs", "error": "", "shared": True, "free_bytes": 1e12}
    assert all(finding.ok for finding in dataset.judge_folder(on_hosts(good, good)))
    for change, check in (
        ({"error": "Permission denied"}, "run folder"),
        ({"free_bytes": 2e9}, "room for checkpoints"),
        ({"shared": False}, "shared run folder"),
    ):
        bad = [f for f in dataset.judge_folder(on_hosts(good, {**good, **change})) if not f.ok]
        assert [(f.check, f.hosts) for f in bad] == [(check, ("h1",))]


def test_a_folder_of_another_host_is_not_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "VISIBLE_S", 0.2)
    assert not dataset.try_folder(tmp_path, "nobody left it", rank=1)["shared"]


def test_a_probe_that_raises_or_hangs_becomes_an_error():
    def refuse():
        raise ConfigError("seen", wanted="wanted", fix="fix")

    assert within(1, refuse) == {"error": {"saw": "seen", "wanted": "wanted", "fix": "fix"}}
    assert within(1, lambda: 1 / 0)["error"]["saw"] == "ZeroDivisionError: division by zero"
    assert within(0.05, threading.Event().wait)["error"]["saw"] == "no answer in 0.05 s"
    assert within(1, lambda: 7) == {"value": 7}
