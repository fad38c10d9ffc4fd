"""The metrics of a run, from its records and its folder."""

import math
import os
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from horovod_owt.monitoring import run_metrics
from horovod_owt.monitoring.run_metrics import RunMetrics
from horovod_owt.parallel.heartbeat import Peer
from horovod_owt.train.rank_times import RankTimes

STEP = {"step": 7, "epoch": 0.5, "loss": 2.5, "lr": 0.1, "images_per_s": 80.0, "step_ms": 100.0}
LABELS = {"run": "first", "job_id": "4711", "attempt": "3"}


@pytest.fixture
def run_dir(tmp_path) -> Path:
    folder = tmp_path / "first"
    folder.mkdir()
    return folder


@pytest.fixture
def metrics(run_dir) -> RunMetrics:
    return RunMetrics(run_dir, attempt=3, job_id="4711", total_steps=100, checkpoint_steps=10)


def value(metrics: RunMetrics, name: str, **labels: str) -> float | None:
    """As a scrape would see it."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(metrics)
    return registry.get_sample_value(name, {**LABELS, **labels})


def write_checkpoint(run_dir: Path, step: int, size: int) -> None:
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(size))


def test_a_step_is_seen_with_its_time(metrics):
    before = time.time()
    assert before - 5 < value(metrics, "owt_last_step_timestamp_seconds") <= before  # the attempt's start
    metrics.record("run", {"first_step": 6, "world_size": 2})
    assert value(metrics, "owt_steps_total") == 6 and value(metrics, "owt_loss") is None
    metrics.record("step", {**STEP, "bad_images": 2})
    metrics.record("step", {**STEP, "step": 8, "bad_images": 1, "grad_norm": 3.0})
    metrics.record("step", {**STEP, "step": 9})
    assert value(metrics, "owt_last_step_timestamp_seconds") >= before
    seen = {
        "owt_steps_total": 9,
        "owt_planned_steps": 100,
        "owt_loss": 2.5,
        "owt_images_per_second": 80,
        "owt_step_seconds": 0.1,
        "owt_bad_images_total": 3,
        "owt_gradient_norm": 3,
        "owt_restarts_total": 2,
        "owt_loss_finite": 1,
    }
    assert {name: value(metrics, name) for name in seen} == seen


def test_checkpoints_have_age_size_and_an_expected_interval(run_dir, metrics, monkeypatch):
    assert value(metrics, "owt_checkpoint_age_seconds") < 60  # since the start
    assert value(metrics, "owt_checkpoint_interval_seconds") is None  # nothing is known yet
    metrics.record("step", STEP)
    assert value(metrics, "owt_checkpoint_interval_seconds") == pytest.approx(1)  # 10 steps of 100 ms
    write_checkpoint(run_dir, 10, 1000)
    metrics.record("checkpoint", {"step": 10})
    assert value(metrics, "owt_checkpoint_size_bytes") == 1000 and value(metrics, "owt_checkpoint_step") == 10
    written = time.time()
    monkeypatch.setattr(run_metrics.time, "time", lambda: written + 60)
    assert value(metrics, "owt_checkpoint_age_seconds") == pytest.approx(60, abs=0.5)
    metrics.record("fault", {"fault": "checkpoint not written: No space left on device", "failures": 1})
    assert value(metrics, "owt_checkpoint_failures_total") == 1 and value(metrics, "owt_faults_total") == 1


@pytest.mark.parametrize("off_s", [-3600, 3600])
def test_the_age_of_a_checkpoint_is_by_this_hosts_clock_not_the_file_servers(
    run_dir, metrics, monkeypatch, off_s
):
    now = time.time()
    monkeypatch.setattr(run_metrics.time, "time", lambda: now)
    metrics.record("step", STEP)
    for step, passed_s in ((10, 30), (20, 60)):
        write_checkpoint(run_dir, step, 1000)
        server = now + passed_s + off_s
        os.utime(run_dir / "checkpoints" / f"step-{step:08d}", (server, server))
        monkeypatch.setattr(run_metrics.time, "time", lambda passed_s=passed_s: now + passed_s)
        metrics.record("checkpoint", {"step": step})
    monkeypatch.setattr(run_metrics.time, "time", lambda: now + 70)
    assert value(metrics, "owt_checkpoint_age_seconds") == pytest.approx(10)
    assert value(metrics, "owt_checkpoint_interval_seconds") == pytest.approx(30)  # with a validation


def test_the_age_of_an_earlier_attempts_checkpoint_is_counted_from_the_start(run_dir):
    write_checkpoint(run_dir, 40, 500)
    old = time.time() - 3600
    os.utime(run_dir / "checkpoints" / "step-00000040", (old, old))
    metrics = RunMetrics(run_dir, attempt=3, job_id="4711")
    assert value(metrics, "owt_checkpoint_age_seconds") < 60 and value(metrics, "owt_checkpoint_step") == 40


def test_slow_and_silent_ranks_are_named_while_they_are(run_dir):
    silent = []
    metrics = RunMetrics(run_dir, attempt=3, job_id="4711", silent_ranks=lambda: silent)
    slow = {"step": 50, "rank": 1, "host": "node7", "what": "compute", "own_ms": 120.0, "others_ms": 100.0}
    named = {"rank": "1", "host": "node7"}
    assert value(metrics, "owt_slow_rank", **named, what="compute") is None
    metrics.record("straggler", {**slow, "recovered": False})
    assert value(metrics, "owt_slow_rank", **named, what="compute") == 1
    metrics.record("straggler", {**slow, "recovered": True})
    assert value(metrics, "owt_slow_rank", **named, what="compute") is None
    assert value(metrics, "owt_silent_rank", **named) is None
    silent.append(Peer(1, "node7", None))
    assert value(metrics, "owt_silent_rank", **named) == 1


def test_a_loss_that_is_not_finite_is_seen(metrics):
    metrics.record("fault", {"fault": "loss is nan", "step": 8, "loss_not_finite": True})
    metrics.record("fault", {"fault": "another one"})
    assert value(metrics, "owt_loss_finite") == 0


def test_spread_of_the_ranks(metrics):
    assert value(metrics, "owt_rank_compute_seconds", stat="min") is None
    metrics.ranks(RankTimes.from_flat([0.01, 0.001, 0.03, 0.04, 0.001, 0, 0.02, 0.001, 0.02]))
    spread = {s: value(metrics, "owt_rank_compute_seconds", stat=s) for s in ("min", "median", "max")}
    assert spread == pytest.approx({"min": 0.01, "median": 0.02, "max": 0.04})
    assert value(metrics, "owt_rank_communication_seconds", stat="max") == pytest.approx(0.03)


def test_a_folder_that_is_gone_costs_its_own_metric_only(run_dir, metrics):
    assert value(metrics, "owt_disk_free_bytes") > 0 and value(metrics, "owt_resident_memory_bytes") > 1e6
    run_dir.rmdir()
    assert value(metrics, "owt_disk_free_bytes") is None
    assert not math.isnan(value(metrics, "owt_resident_memory_bytes"))
