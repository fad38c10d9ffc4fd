"""Programs that tests need and Debian has: installed with apt where that is for us to do."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Unfit(Exception):
    """What this machine or this user cannot do, in one line."""


def install(packages: Mapping[str, str]) -> None:
    """Install what is missing of `packages`: a program, or a pattern of files -> the package that brings it.

    Raises Unfit where that is not for us to do.
    """
    with open(Path(tempfile.gettempdir()) / "owt-tests-install.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other test processes may want the same
        missing = sorted({package for tool, package in packages.items() if not find(tool)})
        if missing:
            _apt_install(missing)


def find(tool: str) -> str | None:
    if "*" in tool:
        return next(iter(glob.glob(tool)), None)
    return shutil.which(tool, path=SYSTEM_PATH)


def _apt_install(packages: Iterable[str]) -> None:
    if not Path("/etc/debian_version").exists():
        raise Unfit(f"{', '.join(packages)} missing, and this is neither Debian nor Ubuntu")
    if os.geteuid() != 0:
        raise Unfit(f"{', '.join(packages)} missing, and only root can install it")
    with daemons_stay_off():
        apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120"]
        for step in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
            done = subprocess.run(
                [*apt, *step],
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
                capture_output=True,
                text=True,
                timeout=300,
            )
    if done.returncode:
        raise Unfit(f"apt-get could not install {' '.join(packages)}: {done.stderr.strip()[-300:]}")


@contextmanager
def daemons_stay_off():
    """Debian starts a daemon once it is installed, unless this file says no."""
    policy = Path("/usr/sbin/policy-rc.d")
    if policy.exists():
        yield
        return
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink()
