"""Job scripts of `owt job render`, and the words that reach the batch process."""

import os
import shlex
import subprocess
from pathlib import Path

from click.testing import CliRunner

from horovod_owt.cli import cli


def rendered(*args: str) -> str:
    done = CliRunner().invoke(cli, ["job", "render", *args], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def words_that_arrive(script: str, folder: Path, *submitted: str, **environment: str) -> list[str]:
    """The argv of the batch process: the script runs under bash, with an `owt` that notes its words."""
    (folder / "bin").mkdir(exist_ok=True)
    stub, seen = folder / "bin" / "owt", folder / "seen"
    stub.write_text(f'#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done > {shlex.quote(str(seen))}\n')
    stub.chmod(0o755)
    (folder / "job.sbatch").write_text(script)
    env = {"PATH": f"{stub.parent}:{os.environ['PATH']}", **environment}
    subprocess.run(["bash", "job.sbatch", *submitted], cwd=folder, env=env, check=True, timeout=20)
    assert not (folder / "broken").exists()
    return seen.read_text().split("\0")[:-1]
