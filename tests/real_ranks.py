"""Real ranks: programs started by real launchers, ended with their children, never without a time limit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

VENV_BIN = Path(sys.executable).parent
PARALLEL = Path(__file__).parent / "parallel"
PROGRAMS = PARALLEL / "programs"
SMALL = ["--recipe", PARALLEL / "small.yaml"]
OWT = [sys.executable, "-m", "horovod_owt"]
NARROW = [sys.executable, PROGRAMS / "narrow.py"]  # the same with few hidden units: small checkpoints
LIMIT_S = 200


@dataclass(frozen=True)
class Finished:
    """How a job ended and what it said."""

    exit_code: int
    stdout: str
    stderr: str

    def json(self):
        """The one JSON line that rank 0 printed, whatever prefix the launcher put before it."""
        (line,) = [line for line in self.stdout.splitlines() if "{" in line]
        return json.loads(line[line.index("{") :])


def launcher_argv(launcher: str, ranks: int) -> list[str]:
    return {
        "horovodrun": ["horovodrun", "--gloo", "-np", str(ranks)],
        "horovodrun-mpi": ["horovodrun", "--mpi", "-np", str(ranks), "--mpi-args=--oversubscribe"],
        "mpirun": ["mpirun", "--oversubscribe", "-np", str(ranks)],
        "torchrun": ["torchrun", "--nproc-per-node", str(ranks), "--no-python"],
        "none": [],
    }[launcher]


class Job:
    """A launcher with its ranks, in a process group of its own."""

    def __init__(self, argv: list[str], env: dict[str, str], cwd: Path | None = None) -> None:
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            cwd=cwd,
            start_new_session=True,
        )

    def finish(self, limit_s: float = LIMIT_S) -> Finished:
        """Wait for the end; a job over its time fails the test with what it had said."""
        try:
            stdout, stderr = self.process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            self.kill()
            stdout, stderr = self.process.communicate()
            pytest.fail(f"not done after {limit_s} s\n{stdout[-4000:]}\n{stderr[-4000:]}")
        return Finished(self.process.returncode, stdout, stderr)

    def kill(self) -> None:
        """End the launcher and every process below it, also those that made groups of their own."""
        try:
            family = [psutil.Process(self.process.pid)]
            family += family[0].children(recursive=True)
        except psutil.NoSuchProcess:
            return
        for process in family:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                pass


@contextmanager
def launch(
    argv: list, *, ranks: int = 2, launcher: str = "horovodrun", cwd: Path | None = None, **env: str
) -> Iterator[Job]:
    """Start `argv` on `ranks` ranks under a launcher; the job is gone at the end of the block."""
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith(("HOROVOD_", "OMPI_COMM", "PMI", "RANK"))
    }
    clean.update(OMP_NUM_THREADS="1", PATH=f"{VENV_BIN}{os.pathsep}{os.environ['PATH']}")
    clean.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    if "OWT_TEST_GPUS" not in env:  # those are pretended
        clean["CUDA_VISIBLE_DEVICES"] = ""  # these tests are of CPU cores, also where there is a GPU
    clean.update(env)
    job = Job([*launcher_argv(launcher, ranks), *map(str, argv)], clean, cwd)
    try:
        yield job
    finally:
        job.kill()
        job.process.communicate()


@pytest.fixture
def start():
    """Start a job as `launch` does; it is gone when the test is."""
    with ExitStack() as jobs:
        yield lambda argv, **options: jobs.enter_context(launch(argv, **options))


@pytest.fixture
def run(start):
    """Start a job, wait for its end, and expect `exit_code` of it (None: any)."""

    def run(argv: list, *, exit_code: int | None = 0, limit_s: float = LIMIT_S, **options) -> Finished:
        done = start(argv, **options).finish(limit_s)
        if exit_code is not None and done.exit_code != exit_code:
            said = f"{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
            pytest.fail(f"exit code {done.exit_code}, not {exit_code}\n{said}")
        return done

    return run


@pytest.fixture
def chance() -> random.Random:
    """Draws of another seed each time; it is printed, and one from $OWT_TEST_SEED is taken in its place."""
    seed = int(os.environ.get("OWT_TEST_SEED") or time.time_ns() % 10**6)
    print(f"OWT_TEST_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def narrow_net(monkeypatch):
    """Nets built in the test itself have as few hidden units as those of narrow.py and several_runs.py."""
    from horovod_owt.model import alexnet_owt

    monkeypatch.setattr(alexnet_owt, "HIDDEN", 98)


@pytest.fixture
def narrow_owt(tmp_path) -> dict[str, str]:
    """An environment whose `owt` is the narrow net."""
    owt = tmp_path / "bin" / "owt"
    owt.parent.mkdir()
    launcher = f'case $1 in launch) exec {VENV_BIN / "owt"} "$@" ;; esac'  # loads no torch
    owt.write_text(f'#!/bin/sh\n{launcher}\nexec {" ".join(map(str, NARROW))} "$@"\n')
    owt.chmod(0o755)
    return {"PATH": f"{owt.parent}{os.pathsep}{VENV_BIN}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """A small image folder: 2 classes, 96 training and 26 validation images (no multiple of a batch here)."""
    from horovod_owt.data.synthetic import write_synthetic

    root = tmp_path_factory.mktemp("images") / "data"
    write_synthetic(root, classes=2, train_per_class=48, val_per_class=13, size=(80, 120))
    return root


def settings(**values) -> list[str]:
    """`--set key=value` for each."""
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def wait_for(condition, limit_s: float = 120):
    """Poll until `condition` gives something true, and return that."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    pytest.fail(f"waited {limit_s} s in vain")


def ranks_below(pid: int) -> dict[int, psutil.Process]:
    """The ranks of a job on this host, by rank."""
    found = {}
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if "train" in process.cmdline() and "python" in process.name():
                env = process.environ()
                rank = env.get("HOROVOD_RANK") or env.get("OMPI_COMM_WORLD_RANK") or env["RANK"]
                found[int(rank)] = process
        except (psutil.NoSuchProcess, psutil.ZombieProcess, KeyError):
            continue
    return found


def steps_done(run_dir: Path) -> int:
    return len(records(run_dir, "step")) if (run_dir / "metrics.jsonl").exists() else 0


def outcome(run_dir: Path) -> dict:
    """How the run's folder says that it ended."""
    return json.loads((run_dir / "outcome.json").read_text())


def records(run_dir: Path, kind: str) -> list[dict]:
    """The lines of a kind in a run's metrics.jsonl."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]
