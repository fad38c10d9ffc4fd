"""What a login node without torch, Horovod or numpy can do: look at runs and jobs, and restart them."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from horovod_owt.runs.checkpoints import FILES, new_checkpoint, write_state

LIGHT = ("click", "yaml", "psutil", "jinja2", "markupsafe", "horovod_owt")


@pytest.fixture
def light(tmp_path):
    """Run Python code with words after it, where LIGHT is all that is installed."""
    site = tmp_path / "site"
    site.mkdir()
    for name in LIGHT:
        (site / name).symlink_to(find_spec(name).submodule_search_locations[0])

    def light(code: str, *words, path: str = ""):
        code = f"import sys; sys.path.append({str(site)!r}); {code}"
        env = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}"}
        argv = [sys.executable, "-I", "-S", "-c", code, *map(str, words)]  # -S: no site-packages
        return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)

    for name in ("torch", "horovod", "numpy", "safetensors", "tqdm"):
        assert light(f"import {name}").stderr.endswith(f"No module named '{name}'\n")
    return light


OWT = "from horovod_owt.cli import main; main()"


def test_a_host_without_them_is_described(light):
    found = json.loads(light(OWT, "info", "--json").stdout)
    assert "pynvml" in found["devices"]["gpus"]["fault"]  # the parent's; torch is loaded in a child
    assert found["network"]["interfaces"] and found["versions"]["code"] and found["host"]["kernel"]


def test_checkpoints_and_jobs_are_looked_at_and_a_job_is_supervised(light, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with new_checkpoint(run_dir, 4) as scratch:
        for name in FILES:
            (scratch / name).write_text("x")
        write_state(scratch, {"epoch": 2})
    listed = light(OWT, "checkpoint", "list", run_dir, "--json")
    assert [row["step"] for row in json.loads(listed.stdout)["checkpoints"]] == [4], listed.stderr
    verified = light(OWT, "checkpoint", "verify", run_dir)
    assert (verified.returncode, verified.stdout) == (0, "step-00000004  whole\n"), verified.stderr

    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\necho "slurm_load_jobs error: Invalid job id specified" >&2; exit 1\n')
    scontrol.chmod(0o755)
    (run_dir / "metrics.jsonl").write_text('{"kind": "step", "step": 4}\n')
    (run_dir / "outcome.json").write_text('{"exit_code": 75}')
    told = light(OWT, "job", "status", "7", "--run-dir", run_dir, "--json", path=str(scontrol.parent))
    assert json.loads(told.stdout)["step"] == 4, told.stderr
    assert "#SBATCH" in light(OWT, "job", "render", "--nodes", "2", "DATA").stdout

    supervise = "from horovod_owt.launch.supervisor import Supervisor as S; sys.exit(S(sys.argv[1:]).run())"
    step = '{\\"kind\\": \\"step\\", \\"step\\": 5}'
    command = ["sh", "-c", f'echo "{step}" >>$2/metrics.jsonl; exit 3', "owt", "--run-dir", run_dir]
    done = light(supervise, *command)
    assert done.returncode == 3 and "restart limit (0) reached" in done.stderr, done.stderr
