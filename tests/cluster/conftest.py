"""A Slurm cluster for the tests here, and images to train on."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from slurm_cluster import SYSTEM_PATH, Unfit, cluster, install

PARALLEL = Path(__file__).parents[1] / "parallel"
VENV_BIN = Path(sys.executable).parent


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A cluster whose users have a narrow `owt` first on PATH."""
    tools = tmp_path_factory.mktemp("bin")
    program = shlex.join([sys.executable, str(PARALLEL / "programs" / "narrow.py")])
    this_code = shlex.quote(str(PARALLEL.parents[1]))  # also where ssh and mpirun pass no PYTHONPATH on
    (tools / "owt").write_text(
        f"#!/bin/sh\nexport PYTHONPATH={this_code}${{PYTHONPATH:+:$PYTHONPATH}}\n"
        # what starts ranks loads no torch, as the narrow one does at once
        f'case $1 in job | launch) exec {shlex.quote(str(VENV_BIN / "owt"))} "$@" ;; esac\n'
        f'exec {program} "$@"\n'
    )
    (tools / "owt").chmod(0o755)
    try:
        install()
        running = cluster(f"{tools}:{VENV_BIN}:{SYSTEM_PATH}")
        slurm = running.__enter__()
    except Unfit as unfit:
        pytest.skip(str(unfit))
    yield slurm
    running.__exit__(None, None, None)


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """2 classes, 48 training and 12 validation images."""
    from horovod_owt.data.synthetic import write_synthetic

    root = tmp_path_factory.mktemp("images") / "data set"
    write_synthetic(root, classes=2, train_per_class=24, val_per_class=6, size=(80, 120))
    return root
