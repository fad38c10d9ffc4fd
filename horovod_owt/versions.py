"""Which code this is and what it is installed with, without loading any of it."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from importlib import metadata
from pathlib import Path

import horovod_owt

PACKAGES = ("torch", "torchvision", "horovod", "numpy", "mpi4py")


def installed_versions() -> dict[str, str]:
    """This package, Python, and what of the packages that count is there, by name."""
    return {"horovod_owt": horovod_owt.__version__, "python": platform.python_version(), **_packages()}


@cache
def _packages() -> dict[str, str]:
    """To read what all distributions say of themselves takes 0.1 s."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower()
        if name in PACKAGES or name.startswith("nvidia-dali"):
            found.setdefault(name, distribution.version)  # the first on sys.path is the one that is imported
    return found


def code_digest(package: Path = Path(horovod_owt.__file__).parent) -> str:
    """A short sha256 of the package's sources and recipes: a checkout can differ under one version."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.suffix in (".py", ".yaml"):
            digest.update(f"{path.relative_to(package)}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
