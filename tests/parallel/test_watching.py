"""What others see of a run with real ranks: Prometheus's alerts, TensorBoard, profiles, timelines."""

from __future__ import annotations

import gzip
import json
import signal
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from contextlib import contextmanager
from datetime import datetime
from importlib import resources

import pytest
from prometheus_tools import installed
from real_ranks import NARROW, SMALL, outcome, ranks_below, settings, steps_done, wait_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from horovod_owt.runs.timeline import complete_timelines

pytestmark = pytest.mark.slow

SCRAPE_S = 5
SETTINGS = {"scrape_interval": f"{SCRAPE_S}s", "scrape_timeout": "4s", "evaluation_interval": "1s"}
# The thresholds that count minutes, for a test that counts seconds.
SHORT = {"15 * 60": "6", "for: 1m": "for: 1s"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


class Prometheus:
    """A server that watches one run by the rules of the package."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1"

    def ask(self, what: str, **query: str) -> dict:
        query = urllib.parse.urlencode(query)
        with urllib.request.urlopen(f"{self._url}/{what}?{query}", timeout=10) as answer:
            return json.load(answer)["data"]

    def value(self, expression: str) -> float | None:
        """Of the one series that the expression gives, if there is one."""
        found = self.ask("query", query=expression)["result"]
        return float(found[0]["value"][1]) if found else None

    def firing(self, name: str) -> dict | None:
        alerts = self.ask("alerts")["alerts"]
        return next((a for a in alerts if a["labels"]["alertname"] == name and a["state"] == "firing"), None)


@contextmanager
def prometheus(folder, target: int):
    """A real Prometheus, on loopback, that scrapes the port `target`."""
    rules = (resources.files("horovod_owt") / "monitoring" / "alerts.yml").read_text()
    for minutes, seconds in SHORT.items():
        assert minutes in rules
        rules = rules.replace(minutes, seconds)
    (folder / "alerts.yml").write_text(rules)
    config = {
        "global": SETTINGS,
        "rule_files": ["alerts.yml"],
        "scrape_configs": [
            {"job_name": "horovod_owt", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}
        ],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))
    port = free_port()
    argv = [installed("prometheus"), f"--config.file={folder}/prometheus.yml"]
    argv += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "prometheus.log").open("w") as log, subprocess.Popen(argv, stderr=log) as server:
        try:
            yield Prometheus(port)
        finally:
            server.terminate()
            server.wait(30)


def answers(server: Prometheus) -> bool:
    try:
        return server.ask("status/runtimeinfo")["CWD"] != ""
    except OSError:
        return False


@pytest.mark.timeout(300)
def test_a_stopped_rank_alerts_within_two_scrapes(start, run, images, tmp_path):
    port, run_dir = free_port(), tmp_path / "first"
    often = settings(metrics_port=port, checkpoint_every=4, max_steps=100_000, epochs=100_000)
    argv = [*NARROW, "train", images, *SMALL, *often, "--run-dir", run_dir]
    with prometheus(tmp_path, port) as server:
        job = start(argv)
        wait_for(lambda: answers(server))
        labels = '{run="first", attempt="1"}'
        wait_for(lambda: (server.value(f"owt_steps_total{labels}") or 0) >= 8)
        assert server.value(f'owt_rank_compute_seconds{labels[:-1]}, stat="max"}}') > 0
        assert server.value(f"owt_checkpoint_size_bytes{labels}") > 1e6
        assert not server.ask("alerts")["alerts"] or not server.firing("OwtRankSilent")

        rank = ranks_below(job.process.pid)[1]
        rank.send_signal(signal.SIGSTOP)
        stopped = time.time()
        alert = wait_for(lambda: server.firing("OwtRankSilent"), 60)
        active = datetime.fromisoformat(alert["activeAt"][:19] + "+00:00").timestamp()
        assert active - stopped <= 2 * SCRAPE_S + 1  # of the evaluation
        assert alert["labels"]["rank"] == "1" and alert["labels"]["run"] == "first"
        wait_for(lambda: server.firing("OwtNoStep"), 60)
        wait_for(lambda: server.firing("OwtCheckpointOld"), 60)
        rank.send_signal(signal.SIGCONT)
        wait_for(lambda: not server.firing("OwtRankSilent") and not server.firing("OwtNoStep"), 60)

        other = [*NARROW, "train", images, *SMALL, *often, "--run-dir", tmp_path / "second"]
        refused = run(other, launcher="none", ranks=1, exit_code=2)
        (line,) = [line for line in refused.stderr.splitlines() if line.startswith("owt: ")]
        assert f"metrics_port={port} on 127.0.0.1: Address already in use" in line

        job.kill()
        wait_for(lambda: server.firing("OwtUnreachable"), 60)


@pytest.mark.timeout(300)
def test_a_killed_run_leaves_whole_traces_and_is_continued_in_tensorboard(start, images, tmp_path):
    run_dir = tmp_path / "run"
    shown = settings(tensorboard="always", grad_norm_every=2, checkpoint_every=4, max_steps=100_000)
    argv = [*NARROW, "train", images, *SMALL, *shown, "--set", "epochs=100000", "--run-dir", run_dir]
    watched = [*argv, "--profile", "2", "--horovod-timeline"]
    job = start(watched)
    traces = [run_dir / "profile" / f"rank-000{rank}.json.gz" for rank in (0, 1)]
    wait_for(lambda: steps_done(run_dir) >= 9 and all(trace.exists() for trace in traces))
    ranks_below(job.process.pid)[0].kill()  # it writes TensorBoard's files and the timeline
    assert job.finish().exit_code != 0

    for trace in traces:
        with gzip.open(trace) as file:
            names = {event["name"] for event in json.load(file)["traceEvents"]}
        assert {"aten::convolution_backward", "reading images"} <= names
        assert "aten::convolution_backward" in trace.with_name(trace.name[:9] + ".txt").read_text()
    complete_timelines(run_dir)  # as rank 1 does, unless the launcher ends it before
    events = json.loads((run_dir / "timeline" / "step-00000000.json").read_text())
    assert "NEGOTIATE_ALLREDUCE" in {event.get("name") for event in events}

    done = steps_done(run_dir)
    job = start(argv)
    wait_for(lambda: steps_done(run_dir) >= done + 4)
    ranks_below(job.process.pid)[0].terminate()
    job.finish()
    assert outcome(run_dir)["exit_code"] == 75
    assert len(list((run_dir / "timeline").iterdir())) == 1  # the second time it was not asked for
    seen = EventAccumulator(str(run_dir / "tensorboard"))
    seen.Reload()
    steps = [event.step for event in seen.Scalars("train/loss")]
    assert steps == list(range(1, outcome(run_dir)["step"] + 1))  # none twice, none missing
    assert seen.Scalars("train/gradient_norm") and seen.Images("augmented/0")
