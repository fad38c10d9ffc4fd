"""Versions of this package and its dependencies, without importing them."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from importlib import metadata
from pathlib import Path

import horovod_owt

PACKAGES = ("torch", "torchvision", "horovod", "numpy", "mpi4py")


def installed_versions() -> dict[str, str]:
    """Versions of this package, Python and those of PACKAGES and DALI that are installed, by name."""
    own = {"horovod_owt": horovod_owt.__version__, "python": platform.python_version()}
    return own | package_versions(PACKAGES)


@cache
def package_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Those of DALI and of these packages that are installed.

    Cached: reading the metadata of all distributions takes 0.1 s.
    """
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower()
        if name in names or name.startswith("nvidia-dali"):
            found.setdefault(name, distribution.version)  # the first on sys.path is imported
    return found


def code_digest(package: Path = Path(horovod_owt.__file__).parent) -> str:
    """A short sha256 of the package's sources and recipes, because checkouts of one version may differ."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.suffix in (".py", ".yaml"):
            digest.update(f"{path.relative_to(package)}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
