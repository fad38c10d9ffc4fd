"""Fixtures for the tests of launch/setup: a place to set up, fake tools, the script, Horovod's source."""

import os
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest
from set_up_support import LIMIT_S, REPO, horovod, installed, patches, place


@pytest.fixture
def here(tmp_path) -> place.Place:
    """An installation that is about to be made, with a cache of its own and nothing on PATH."""
    return place.Place(tmp_path / "venv", {"HOME": str(tmp_path / "home"), "PATH": str(tmp_path / "bin")})


@pytest.fixture
def tool(tmp_path):
    """Put a shell script of this name on the only PATH folder that the test's children see."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)

    def write(name: str, body: str) -> Path:
        script = folder / name
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)
        return script

    return write


@pytest.fixture
def set_up(tmp_path):
    """Run launch/setup with a fresh home and a bare PATH, far from this installation."""

    def run(*words: str, **environ: str) -> subprocess.CompletedProcess:
        env = {"HOME": str(tmp_path / "home"), "PATH": str(tmp_path / "bin"), **environ}
        return subprocess.run(
            [sys.executable, REPO / "launch" / "setup", "--venv", tmp_path / "venv", *words],
            env=env,
            text=True,
            capture_output=True,
            timeout=60,
        )

    return run


@pytest.fixture(scope="session")
def sdist(tmp_path_factory) -> Path:
    """Horovod's source archive: the one that setup left in the cache, else a download checked by hash."""
    cached = place.Place(Path(sys.prefix)).cache / "sdist" / horovod.SDIST
    if cached.exists() and place.file_digest(cached) == horovod.SHA256:
        return cached
    environ = {**os.environ, "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}
    return horovod.fetch_sdist(place.Place(Path(sys.prefix), environ))


@pytest.fixture(scope="session")
def released(sdist, tmp_path_factory) -> Path:
    """Of Horovod's source as released, the files that the patches touch, those beside them in the torch
    binding and flatbuffers, and the CMake modules; not to be written to."""
    wanted = {
        line[6:].split()[0]
        for patch in place.PATCHES
        for line in patch.read_text().splitlines()
        if line.startswith("+++ b/")
    }
    folder = tmp_path_factory.mktemp("released")
    top = f"horovod-{horovod.VERSION}/"
    with tarfile.open(sdist) as archive:
        for member in archive:
            name = member.name.removeprefix(top)
            if name in wanted or name.startswith(("cmake/", "horovod/torch/", "third_party/flatbuffers/")):
                archive.extract(member, folder, **({"filter": "data"} if sys.version_info >= (3, 12) else {}))
    return folder / top


@pytest.fixture
def source(released, tmp_path) -> Path:
    """A copy of the released files for one test."""
    return Path(shutil.copytree(released, tmp_path / released.name))


@pytest.fixture
def patched(source) -> Path:
    patches.apply(place.PATCHES, source)
    return source


@pytest.fixture
def ranks(tmp_path):
    """Start this many ranks of a program under a launcher; what they are and say ends with the test."""
    started = []

    def start(
        np: int, program: str, *words: str, under: tuple[str, ...] = (), **environ: str
    ) -> subprocess.Popen:
        here = installed()
        script = tmp_path / "program.py"
        script.write_text(program)
        launcher = [here.bin / "horovodrun", "--gloo", "-np", str(np)] if np > 1 else []
        job = subprocess.Popen(
            [*under, *launcher, sys.executable, script, *words],
            env={**here.child_env(), **environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=tmp_path,
        )
        limit = threading.Timer(LIMIT_S, job.terminate)  # horovodrun ends its ranks; then reading ends too
        limit.start()
        started.append((job, limit))
        return job

    yield start
    for job, limit in started:
        limit.cancel()
        if job.poll() is None:
            job.terminate()
        job.wait(20)
        job.stdout.close()
