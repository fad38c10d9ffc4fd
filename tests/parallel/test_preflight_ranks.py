"""Preflight on real ranks of this host: under each launcher, and with a rank that stands still."""

import json
import os
import re
from importlib.metadata import version

import pytest
from real_ranks import OWT, PROGRAMS


@pytest.mark.alone  # whoever slows the network down is told
@pytest.mark.parametrize("launcher", ["none", "mpirun", pytest.param("horovodrun", marks=pytest.mark.slow)])
def test_preflight_looks_at_ranks_under_any_launcher(run, images, tmp_path, launcher):
    done = run(
        [*OWT, "preflight", images, "--run-dir", tmp_path / "run", "--json"], ranks=2, launcher=launcher
    )
    findings = done.json()["findings"]
    checks = {finding["check"] for finding in findings}
    assert all(finding["ok"] for finding in findings)
    assert {"versions", "devices", "cores", "/dev/shm", "data", "run folder", "interface", "ranks"} <= checks
    assert ("allreduce" in checks) == (launcher != "none")
    ranks = {finding["check"]: finding["saw"] for finding in findings}["ranks"]
    assert ranks.startswith("1 answered" if launcher == "none" else "2 answered")
    assert "preflight: versions" in done.stderr + done.stdout


@pytest.mark.parametrize("launcher", ["horovodrun", pytest.param("mpirun", marks=pytest.mark.slow)])
def test_a_stopped_rank_is_named_with_the_check_and_no_other_rank_hangs(run, tmp_path, launcher):
    program = ["python", PROGRAMS / "deaf.py", "preflight", "--json", "--run-dir", tmp_path]
    done = run(program, ranks=3, launcher=launcher, exit_code=3, limit_s=90, OWT_TEST_DEAF_TO="limits")
    findings = {finding["check"]: finding for finding in done.json()["findings"]}
    bad = {check: finding["saw"] for check, finding in findings.items() if not finding["ok"]}
    assert "(rank 1) did not answer: limits" in bad["ranks"]
    assert "not measured" in bad["allreduce"]
    # what was asked before is judged of all three; their limits are, of the two who told them
    assert "(ranks 0-2)" in findings["devices"]["saw"]
    assert f"torch {version('torch')}" in findings["versions"]["saw"]
    cores = int(re.search(r" (\d+) cores? for 3 ranks$", findings["cores"]["saw"])[1])
    assert 1 <= cores <= len(os.sched_getaffinity(0))
    assert findings["cores"]["ok"] == (cores >= 3)
    assert bad.keys() == {"ranks", "allreduce"} | ({"cores"} if cores < 3 else set())


def test_a_data_set_that_is_not_there_is_a_finding_not_an_end(run, tmp_path):
    done = run([*OWT, "preflight", tmp_path / "none", "--run-dir", tmp_path], launcher="none", exit_code=3)
    assert "BAD   data" in done.stdout and f"{tmp_path}/none does not exist" in done.stdout
    assert "1 bad finding" in done.stderr and "fix: pass the path of the data set" in done.stdout


def test_json_is_all_that_stdout_has(run, tmp_path):
    done = run([*OWT, "preflight", "--json", "--run-dir", tmp_path], launcher="none")
    assert json.loads(done.stdout)["findings"]
