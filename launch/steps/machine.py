"""Inspect this machine: GPUs, Python, disk space."""

import re
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from steps.process import Missing, ask, outcome

# Measured for the cpu lane with Python 3.11: docs/setup.md
VENV_GB = 8  # 6.3 installed, the rest temporary
CACHE_GB = 5  # pip's own copies of the wheels, where the index is a remote one, and the build
BUILD_GB = 1
PCI_DEVICES = Path("/sys/bus/pci/devices")
OLDEST_PYTHON = 10  # minor version; launch/setup itself rejects older ones


@dataclass(frozen=True)
class Gpu:
    name: str
    driver: str
    compute_capability: float | None  # None: the driver is too old to report it

    @property
    def capability(self) -> float:
        """Drivers that do not report the compute capability (before 510) are taken for Kepler's."""
        return self.compute_capability or 3.7

    @property
    def branch(self) -> int:
        """The driver's branch: 535 of 535.183.01."""
        return int(re.match(r"\d*", self.driver)[0] or 0)

    def __str__(self) -> str:
        seen = f" of compute capability {self.compute_capability}" if self.compute_capability else ""
        return f"{self.name}{seen}, driver {self.driver}"


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


def driver_fault() -> str:
    """That nvidia-smi lists none of this machine's GPUs, and what it says; empty without GPUs or nvidia-smi.

    A container sees its host's PCI bus even if it was given no GPU; it has no nvidia-smi then.
    """
    count = sum(map(_is_nvidia_gpu, PCI_DEVICES.glob("*")))
    if not count or shutil.which("nvidia-smi") is None or list_gpus():
        return ""
    _, said = outcome(["nvidia-smi", "-L"])
    said = " ".join(said.split())[:200] or "nothing"
    return f"{count} NVIDIA GPU(s) on the PCI bus, but nvidia-smi lists none; it says: {said}"


def _is_nvidia_gpu(device: Path) -> bool:
    try:
        vendor, kind = ((device / name).read_text(encoding="utf-8").strip() for name in ("vendor", "class"))
    except OSError:
        return False
    return vendor == "0x10de" and kind.startswith("0x03")  # a display controller; 0x04 is a GPU's sound


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


def check_space(place) -> None:
    """Check for enough disk space before anything is written; to continue, only for what a build takes."""
    wanted_gb = {place.venv: VENV_GB, place.cache: CACHE_GB}
    if place.was_begun("packages"):
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
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return []
    return sorted({"avx", "fma", "f16c"} & set(flags[1].split())) if flags else []
