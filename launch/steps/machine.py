"""Inspect this machine: GPUs, Python, CMake, CUDA, disk space."""

import re
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from steps import compiler
from steps.compiler import Compiler
from steps.process import Lacking, Missing, ask

# Measured for the cpu lane with Python 3.11: docs/setup.md
VENV_GB = 8  # 6.3 installed, the rest temporary
CACHE_GB = 5  # pip's own copies of the wheels, where the index is a remote one, and the build
BUILD_GB = 1
OLDEST_PYTHON = 10  # minor version; launch/setup itself rejects older ones
CUDA_DEFAULT = Path("/usr/local/cuda")


@dataclass(frozen=True)
class Gpu:
    name: str
    driver: str
    compute_capability: float | None  # None: the driver is too old to report it


def list_gpus() -> list[Gpu]:
    """The NVIDIA GPUs that nvidia-smi lists; empty without it or without a driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    fields = ask(["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"])
    if fields is None:
        fields = ask(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    gpus = []
    for line in (fields or "").splitlines():
        words = [word.strip() for word in line.split(",")]
        if len(words) >= 2:
            capability = words[2] if len(words) > 2 else ""
            known = re.fullmatch(r"\d+\.\d+", capability)
            gpus.append(Gpu(words[0], words[1], float(capability) if known else None))
    return gpus


@dataclass(frozen=True)
class Tools:
    """The tools that build Horovod; the strings are part of the wheel's key."""

    cxx: Compiler
    cmake: str
    cuda_home: Path | None = None
    nvcc: str = ""  # its last line


def check_python(lane) -> None:
    """Check that this Python can create a virtual environment and has its headers."""
    this = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
    if sys.version_info[1] > lane.python_newest:
        others = [f"python3.{minor}" for minor in range(lane.python_newest, OLDEST_PYTHON - 1, -1)]
        here = next((name for name in others if shutil.which(name)), None)
        get = f"run `{here} launch/setup`" if here else f"install one, such as {others[0]}, and run that"
        raise Missing(
            f"this is {this}; torch {lane.torch} of the {lane.name} lane has wheels for Python "
            f"3.{OLDEST_PYTHON} to 3.{lane.python_newest}: {get}"
        )
    version = this.removeprefix("Python ")
    lacking = []
    if find_spec("venv") is None or find_spec("ensurepip") is None:
        lacking.append(("the venv module", f"python{version}-venv"))
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        lacking.append(("its headers (Python.h)", f"python{version}-dev"))
    if lacking:
        raise Missing(
            f"{this} at {sys.executable} lacks {' and '.join(what for what, _ in lacking)}: "
            f"apt-get install {' '.join(package for _, package in lacking)}"
        )


def check_build_tools(lane, environ: Mapping[str, str]) -> Tools:
    """Find the tools of the Horovod build before anything is downloaded; reports all missing ones at once."""
    lacking = []  # (what was seen and wanted, Debian package)
    cxx = None
    try:
        cxx = compiler.choose(lane.gcc, environ)
    except Lacking as fault:
        lacking.append((fault.seen, fault.package))
    cmake = (ask(["cmake", "--version"]) or "").partition("\n")[0]
    found = re.search(r"(\d+)\.(\d+)", cmake)
    if not found:
        lacking.append(("no CMake", "cmake"))
    elif (int(found[1]), int(found[2])) < (3, 13):
        lacking.append((f"{cmake}, wanted >= 3.13", "cmake"))
    if shutil.which("make") is None:
        lacking.append(("no make", "make"))
    cuda_home, nvcc = None, ""
    if lane.cuda_major is not None:
        cuda_home, nvcc = find_cuda(environ)
        if f"release {lane.cuda_major}." not in nvcc:
            seen = f"{cuda_home}/bin/nvcc is {nvcc}" if nvcc else "no nvcc (set CUDA_HOME to the toolkit)"
            lacking.append((f"{seen}, wanted CUDA {lane.cuda_major}'s", f"cuda-toolkit-{lane.cuda_major}-0"))
    if lacking:
        raise Missing(
            f"{'; '.join(what for what, _ in lacking)}: "
            f"apt-get install {' '.join(package for _, package in lacking)}"
        )
    return Tools(cxx, cmake, cuda_home, nvcc)


def find_cuda(environ: Mapping[str, str]) -> tuple[Path | None, str]:
    """The CUDA toolkit's root and its nvcc's version."""
    home = environ.get("HOROVOD_CUDA_HOME") or environ.get("CUDA_HOME")
    nvcc = Path(home, "bin", "nvcc") if home else shutil.which("nvcc")
    if nvcc is None and (CUDA_DEFAULT / "bin" / "nvcc").exists():
        nvcc = CUDA_DEFAULT / "bin" / "nvcc"
    if nvcc is None:
        return None, ""
    release = re.search(r"release [\d.]+", ask([nvcc, "--version"]) or "")
    return Path(nvcc).resolve().parents[1], release[0] if release else ""


def check_space(place) -> None:
    """Check for enough disk space before anything is written."""
    wanted_gb = {place.venv: VENV_GB, place.cache: CACHE_GB}
    if place.was_done("packages"):
        wanted_gb = {place.cache: BUILD_GB}
    disks = {}  # device -> folders on it
    for folder in wanted_gb:
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        disks.setdefault(there.stat().st_dev, []).append((folder, there))
    for folders in disks.values():
        need_gb = sum(wanted_gb[folder] for folder, _ in folders)
        free_gb = shutil.disk_usage(folders[0][1]).free / 1e9
        if free_gb < need_gb:
            names = " and ".join(str(folder) for folder, _ in folders)
            raise Missing(
                f"{free_gb:.1f} GB free for {names}, wanted {need_gb:.0f} GB: free some space, "
                "or choose another place with --venv or XDG_CACHE_HOME"
            )


def build_cpu_flags() -> list[str]:
    """The instruction sets of this CPU that Horovod's default build would use."""
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return []
    return sorted({"avx", "fma", "f16c"} & set(flags[1].split())) if flags else []
