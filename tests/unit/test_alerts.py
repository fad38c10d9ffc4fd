"""Alert rules and dashboard: accepted by Prometheus, and made of metrics that runs have."""

import json
import re
import subprocess
from importlib import resources
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from prometheus_tools import installed

from horovod_owt.cli import cli
from horovod_owt.monitoring.run_metrics import RunMetrics
from horovod_owt.parallel.heartbeat import Peer
from horovod_owt.train.rank_times import RankTimes

MONITORING = resources.files("horovod_owt") / "monitoring"
LABELS = {"run", "job_id", "attempt", "rank", "host", "what", "stat"}


def promtool(*words: str | Path) -> str:
    done = subprocess.run(
        [installed("promtool"), *map(str, words)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def exported(run_dir: Path) -> set[str]:
    """The metrics of a run in which everything has happened."""
    folder = run_dir / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    silent = [Peer(1, "node2", None)]
    metrics = RunMetrics(run_dir, attempt=1, job_id="1", checkpoint_steps=1, silent_ranks=lambda: silent)
    step = {"step": 1, "epoch": 0.1, "loss": 1.0, "lr": 0.1, "images_per_s": 1.0, "step_ms": 1.0}
    metrics.record("step", {**step, "grad_norm": 1.0})
    metrics.record("validation", {"loss": 1.0, "top1": 1.0, "top5": 5.0})
    metrics.record("straggler", {"rank": 1, "host": "node2", "what": "data", "recovered": False})
    metrics.ranks(RankTimes.from_flat([1.0, 1.0, 1.0]))
    return {sample.name for metric in metrics.collect() for sample in metric.samples}


def expressions_of_the_dashboard() -> list[str]:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    queries = [each["query"] for each in dashboard["templating"]["list"] if each["type"] == "query"]
    variables = [query["query"] for query in queries]
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]] + variables


def test_promtool_accepts_the_rules():
    rules = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
    assert f"{len(rules)} rules found" in promtool("check", "rules", MONITORING / "alerts.yml")


def test_each_alert_fires_when_it_should_and_not_before(tmp_path):
    cases = Path(__file__).with_name("rule_tests.yml").read_text()
    tested = tmp_path / "tests.yml"
    tested.write_text(cases.replace("{rules}", str(MONITORING / "alerts.yml")))
    assert "SUCCESS" in promtool("test", "rules", tested)
    rules = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
    fired = set(re.findall(r"alertname: (\w+)\n", cases))
    assert fired == {rule["alert"] for rule in rules}


def test_rules_and_dashboard_ask_for_metrics_that_runs_have(tmp_path):
    known = exported(tmp_path)
    rules = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
    for expression in [*(rule["expr"] for rule in rules), *expressions_of_the_dashboard()]:
        names = set(re.findall(r"\bowt_\w+", expression))
        assert names <= known and (names or "up{" in expression), expression


def test_the_speed_on_the_dashboard_allows_for_steps_that_are_done_again():
    """As an elastic job does after a lost rank; `rate` takes that for a counter that began at 0 again."""
    over_time = re.compile(r"\(owt_steps_total\{[^}]*\}\[")
    of_steps = [each for each in expressions_of_the_dashboard() if over_time.search(each)]
    assert of_steps and all("deriv(" in each for each in of_steps)


def test_every_metric_has_its_place_on_the_dashboard(tmp_path):
    shown = set(re.findall(r"\bowt_\w+", " ".join(expressions_of_the_dashboard())))
    assert exported(tmp_path) - shown == {
        *("owt_checkpoint_step", "owt_loss_finite", "owt_validation_loss"),
    }


def test_prometheus_understands_each_expression_of_the_dashboard(tmp_path):
    """As rules, because promtool parses those."""
    expressions = [e for e in expressions_of_the_dashboard() if not e.startswith("label_values")]
    rules = [{"record": f"owt:panel{number}", "expr": e} for number, e in enumerate(expressions)]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(expressions)} rules found" in promtool("check", "rules", file)


def test_panels_do_not_overlap_and_know_the_labels():
    panels = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    taken = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not taken & cells and at["x"] + at["w"] <= 24
        taken |= cells
        for target in panel["targets"]:
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= LABELS


@pytest.mark.parametrize(("command", "file"), [("rules", "alerts.yml"), ("dashboard", "dashboard.json")])
def test_they_are_printed(command, file):
    done = CliRunner().invoke(cli, ["metrics", command])
    assert done.exit_code == 0 and done.stdout == (MONITORING / file).read_text()
