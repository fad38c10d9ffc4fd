"""What the tests of launch/setup share beside fixtures; importing it puts the steps on the path."""

import shutil
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
LIMIT_S = 60  # of a job of real ranks
sys.path.insert(0, str(REPO / "launch"))

from steps import (  # noqa: E402
    horovod,
    lanes,
    machine,
    mpi,
    packages,
    patches,
    place,
    process,
    proof,
    toolkit,
    tools,
)

__all__ = [
    "horovod",
    "lanes",
    "machine",
    "mpi",
    "packages",
    "patches",
    "place",
    "process",
    "proof",
    "toolkit",
    "tools",
]


def installed() -> place.Place:
    """The installation that these tests run in."""
    found = place.Place(Path(sys.prefix))
    if not (found.bin / "horovodrun").exists():
        pytest.fail(f"{found.venv} has no Horovod: run launch/setup first")
    return found


def needs(command: str) -> str:
    found = shutil.which(command)
    if found is None:
        pytest.skip(f"no `{command}` on PATH")
    return found
