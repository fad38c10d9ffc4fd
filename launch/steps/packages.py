"""The virtual environment and its packages: names from setup.cfg, versions from the lane."""

import os
import re
import sys
from collections.abc import Sequence
from configparser import ConfigParser
from dataclasses import asdict
from pathlib import Path

from steps import mpi
from steps.lanes import Lane
from steps.mpi import Mpi
from steps.place import REPO, Place, digest, file_digest
from steps.process import Failed, Missing, ask, run, say

# Build requirements of Horovod, besides the project's own requirements.
BUILD_REQUIRES = ("setuptools", "wheel", "packaging", "cffi", "cloudpickle")


def check_venv(place: Place) -> None:
    """Refuse a folder of the user's own files, or one that pip cannot write to or Python not load from."""
    if place.venv.exists() and not (place.venv / "pyvenv.cfg").exists() and any(place.venv.iterdir()):
        raise Missing(
            f"{place.venv} exists and is not a virtual environment: choose another folder with --venv"
        )
    there = next(folder for folder in (place.venv, *place.venv.parents) if folder.exists())
    if not os.access(there, os.W_OK):
        raise Missing(f"{there} is not writable: choose another folder with --venv")
    if os.statvfs(there).f_flag & os.ST_NOEXEC:
        raise Missing(
            f"{there} is mounted noexec, no library loads from it: choose another folder with --venv"
        )
    if not os.access(REPO, os.W_OK):
        raise Missing(
            f"{REPO} is not writable, pip puts horovod_owt.egg-info there: copy it to a folder of yours"
        )


def make_venv(place: Place) -> None:
    """Make the virtual environment, or again where it is incomplete or its Python gone or replaced."""
    if not ask([place.python, "-m", "pip", "--version"], env=place.child_env()):
        for link in place.bin.glob("python*"):
            if not link.exists():  # the Python is gone; venv leaves links as they are
                link.unlink()
        run("virtual environment", [sys.executable, "-m", "venv", place.venv], log=place.log("venv"))
        place.forget_steps()  # another version of Python has none of the packages
    version = ask([place.python, "-I", "-c", "import sys; print(*sys.version_info[:2], sep='.')"])
    if version is None:
        raise Missing(f"{place.python} does not run: delete {place.venv} and run this again")


def requirements(setup_cfg: Path, extras: tuple[str, ...]) -> list[str]:
    """The project's requirements without Horovod, which pip would build from the unpatched archive."""
    parser = ConfigParser()
    parser.read(setup_cfg)
    lines = parser["options"]["install_requires"].splitlines()
    for extra in extras:
        lines += parser["options.extras_require"][extra].splitlines()
    named = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    return [line for line in named if re.match(r"[\w.-]+", line)[0].lower() != "horovod"]


def install_requirements(place: Place, lane: Lane, chosen: Mpi) -> Mpi:
    """Install everything but Horovod and the project; returns the MPI that was installed."""
    wanted = [*BUILD_REQUIRES, *requirements(REPO / "setup.cfg", lane.extras)]
    pins = [file_digest(file) for file in sorted(lane.constraints.parent.glob("*.txt"))]
    inputs = digest(wanted, pins, lane.name, asdict(chosen))
    if place.is_done("packages", inputs):
        return mpi.kept(place)
    place.mark("packages", None)
    before = mpi.kept(place)
    if before.there and before.source != chosen.source:
        # pip's mpirun in the virtual environment would hide the site's, and mpi4py is built for one of them
        pip(place, "mpi", "uninstall", "--yes", mpi.PIP_MPI, "mpi4py")
    if chosen.source == "pip":
        chosen_now = _install_pip_mpi(place, lane)
    else:
        chosen_now = chosen
    mpi4py = [line for line in wanted if line.startswith("mpi4py")]
    if chosen.source == "site" or not chosen_now.there:
        wanted = [line for line in wanted if line not in mpi4py]
    pip(place, "packages", "install", "-c", lane.constraints, *wanted)
    if chosen.source == "site":
        _build_mpi4py(place, lane, mpi4py)
    place.mark("packages", inputs, mpi=asdict(chosen_now))
    return chosen_now


def _build_mpi4py(place: Place, lane: Lane, mpi4py: Sequence[str]) -> None:
    """Build mpi4py with the site's mpicc: the wheel guesses the library.

    Always anew: what is installed, or in pip's cache, may have been built with another MPI of the site.
    """
    anew = ["--force-reinstall", "--no-deps", "--no-cache-dir", "--no-binary", "mpi4py"]
    pip(place, "mpi4py", "install", "-c", lane.constraints, *anew, *mpi4py)


def _install_pip_mpi(place: Place, lane: Lane) -> Mpi:
    """Install pip's MPI; on failure go without: Gloo suffices, and the table lists what is missing."""
    try:
        pip(place, "mpi", "install", "-c", lane.constraints, mpi.PIP_MPI)
    except Failed as fault:
        say(f"{fault}; continuing without MPI")
    return mpi.installed_from_pip(place)


def install_project(place: Place) -> None:
    """Install `owt` into the virtual environment, in editable mode from this checkout."""
    inputs = digest([file_digest(REPO / name) for name in ("setup.cfg", "pyproject.toml")], str(REPO))
    if place.is_done("project", inputs):
        return
    pip(place, "project", "install", "--no-deps", "--no-build-isolation", "--editable", REPO)
    place.mark("project", inputs)


def pip(place: Place, log_name: str, *words: str | Path) -> None:
    """Run pip; what it installs is not compiled to bytecode.

    Compiling their four million lines is a good part of pip's time. Most modules are never imported; the rest
    are compiled at their first import, those that every rank needs by the proof at the end of setup.
    """
    words = (words[0], *(["--no-compile"] if words[0] == "install" else []), *words[1:])
    run(
        f"pip {words[0]} ({log_name})",
        [place.python, "-m", "pip", *words],
        log=place.log(log_name),
        env=place.build_env(),
        cwd=place.cache,
    )
