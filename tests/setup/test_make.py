"""The Makefile's variables, in the commands that it would run."""

import os
import subprocess

import pytest
from set_up_support import REPO


@pytest.mark.parametrize(
    "venv, bin_folder",
    [
        (".venv", f"{REPO}/.venv/bin"),
        ("my venv", f"{REPO}/my venv/bin"),
        ("/opt/the venv", "/opt/the venv/bin"),
    ],
)
def test_a_virtual_environment_may_be_anywhere(venv, bin_folder):
    shown = commands("quickstart", f"VENV={venv}", "DATA=/my data")
    assert f'launch/setup --venv "{venv}"' in shown
    assert f'PATH="{bin_folder}:$PATH" python launch/quickstart "/my data" "quickstart/runs"' in shown


def test_a_lane_has_an_environment_of_its_own():
    shown = commands("test", "LANE=k80")
    assert 'launch/setup --venv ".venv-k80" --lane k80' in shown
    assert f'PATH="{REPO}/.venv-k80/bin:$PATH" pytest' in shown


def commands(*words: str) -> str:
    """What make would run; without the variables of a make that runs these tests."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    for name in ("VENV", "LANE", "DATA", "RUNS"):
        environ.pop(name, None)
    argv = ["make", "--dry-run", *words]
    return subprocess.run(
        argv, cwd=REPO, env=environ, text=True, capture_output=True, timeout=60, check=True
    ).stdout
