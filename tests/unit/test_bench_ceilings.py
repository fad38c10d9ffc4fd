"""Plain sums over TCP and through shared memory, the sizes of collectives, reports of benchmarks as text."""

import threading

import numpy as np
import pytest

from horovod_owt.bench.boston import format_boston_report
from horovod_owt.bench.ceilings import format_ceilings_report
from horovod_owt.bench.collectives import BUS_FACTORS, format_collectives_report, sizes
from horovod_owt.bench.request import refuse_uncompilable
from horovod_owt.bench.shared_sum import sum_chunks
from horovod_owt.bench.tcp_ring import TcpRing, open_server, pair_on_this_host
from horovod_owt.errors import ConfigError


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_the_tcp_ring_sums_over_its_ranks(ranks):
    servers = [open_server() for _ in range(ranks)]
    addresses = [server.getsockname() for server in servers]
    values = [np.random.default_rng(rank).random(7 * ranks).astype(np.float32) for rank in range(ranks)]
    expected = np.sum(values, axis=0, dtype=np.float32)

    def rank_main(rank: int) -> None:
        ring = TcpRing(rank, addresses, servers[rank])
        ring.allreduce(values[rank])
        ring.close()

    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for server in servers:
        server.close()
    for found in values:
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_one_rank_times_a_ring_with_a_second_process():
    with pair_on_this_host([(1 << 16, 3), (64, 2)]) as run:
        large, small = run()
    assert len(large) == 3 and len(small) == 2 and min(large + small) > 0


def test_a_sum_through_shared_memory_adds_what_the_others_wrote():
    """Seen by rank 1 of 3, between ranks that have written numbers for it and their own sums."""
    values = np.arange(6, dtype=np.float32)
    slots = np.full((3, 6), 10, dtype=np.float32)
    sum_chunks(values[None], slots, rank=1)
    assert values.tolist() == [10, 10, 2 + 20, 3 + 20, 10, 10]
    assert slots[1].tolist() == [0, 1, 22, 23, 4, 5] and (slots[[0, 2]] == 10).all()


def test_boston_has_a_thousand_classes_of_real_jpegs(tmp_path):
    from horovod_owt.bench.boston import given_or_relabelled
    from horovod_owt.data.store import open_data_set

    with pytest.MonkeyPatch.context() as patch:  # smaller images are drawn faster
        patch.setattr("horovod_owt.bench.images.SYNTHETIC", SMALL)
        with given_or_relabelled(None) as root:
            data = open_data_set(root)
            assert len(data.classes) == len(data.train) == 1000
            jpegs = {data.train.read(index) for index in range(20)}
    assert len(jpegs) == 6 and all(jpeg.startswith(b"\xff\xd8") for jpeg in jpegs)
    with given_or_relabelled(tmp_path) as root:
        assert root == tmp_path


def test_sizes_of_collectives():
    assert sizes(1024, 20_000) == [1024, 4096, 16_384]
    assert sizes(1 << 10, 256 << 20)[-1] == 256 << 20
    for low, high in ((0, 10), (10, 8)):
        with pytest.raises(ConfigError):
            sizes(low, high)


def test_bus_bandwidths_are_those_of_nccl_tests():
    assert {name: factor(4) for name, factor in BUS_FACTORS.items()} == {
        "allreduce": 1.5,
        "allgather": 0.75,
        "alltoall": 0.75,
        "broadcast": 1.0,
    }


SMALL = {"classes": 2, "train_per_class": 3, "val_per_class": 1, "size": (32, 40)}
VERSIONS = {"versions": {"torch": "2"}, "device": "cpu"}


def test_reports_are_readable():
    row = {"collective": "allreduce", "bytes": 4096, "us": {"p25": 1.0, "median": 2.0}}
    row |= {"algbw_gb_s": 2.048, "busbw_gb_s": 2.048}
    method = {"library": "gloo", "ranks": 2, "time": "t", "bandwidths": "b", **VERSIONS}
    assert "allreduce          4,096" in format_collectives_report({"rows": [row], "method": method})

    rows = [
        {"what": "update", "reached": 5.0, "ceiling": 10.0, "unit": "GB/s", "share": 0.5},
        {"what": "allreduce", "reached": None, "ceiling": 1.0, "unit": "GB/s", "share": None},
    ]
    method = {"model": "alexnet-owt", "precision": "fp32", "ranks": 1, "batch_per_rank": 8, **VERSIONS}
    method |= {
        "image_size": 224,
        "threads_per_rank": 1,
        "ceilings": {"update": "a copy", "allreduce": "a ring"},
    }
    text = format_ceilings_report({"rows": rows, "method": method})
    assert "50%  a copy" in text and "-  a ring" in text

    report = {
        "ranks": 2,
        "strategy": "hybrid",
        "global_batch": 128,
        "batches": 60,
        "s_per_batch": {"min": 1.6, "p25": 1.7, "median": 1.8, "p75": 1.9},
        "minutes_for_1000": 30.0,
        "data_wait_share": 0.01,
        "loss": 6.9077,
        "log_classes": 6.9078,
        "reported": {"s_per_batch": 1.7, "minutes_for_1000": 32, "error": 6.9},
        "planned": {"s_per_batch": 0.047, "minutes_for_1000": 0.78},
        "method": {**VERSIONS, "model": "a", "threads_per_rank": 1, "pipeline": "dali", "warmup_steps": 3},
    }
    text = format_boston_report(report)
    assert "1.800" in text and "1.7" in text and "6.9077" in text and "0.047" in text


def test_a_compiled_net_needs_a_compiler_and_time_for_it(monkeypatch):
    monkeypatch.setenv("CXX", "true")
    refuse_uncompilable(1)
    with pytest.raises(ConfigError, match="--warmup 0 with --against compile; wanted at least 1"):
        refuse_uncompilable(0)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="no-such-compiler not found"):
        refuse_uncompilable(1)
