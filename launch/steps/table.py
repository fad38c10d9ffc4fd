"""The table that setup prints at the end."""

import json
import os
import shutil

from steps.horovod import Build
from steps.lanes import Lane
from steps.mpi import Mpi
from steps.place import PATCHES, Place
from steps.process import ask
from steps.tools import Tools

Rows = list[tuple[str, str]]


def rows(
    place: Place,
    lane: Lane,
    tools: Tools,
    mpi: Mpi,
    build: Build,
    proofs: dict[str, dict],
) -> Rows:
    names = ("torch", "torchvision", lane.dali, "mpi4py")
    versions = json.loads(ask([place.python, "-I", "-c", VERSIONS, *names]) or "{}")
    table = [
        ("lane", lane.name),
        ("Python", versions.get("python", "-")),
        ("torch, torchvision", f"{versions.get('torch', '-')}, {versions.get('torchvision', '-')}"),
        ("DALI", versions.get(lane.dali, "-")),
        (
            "MPI, mpi4py",
            f"{mpi.version} from {mpi.source}, {versions.get('mpi4py', '-')}" if mpi.there else "none",
        ),
        ("Horovod", f"{build.version} ({len(PATCHES)} patches)"),
        ("compiler", tools.cxx.version + (f", nvcc {tools.nvcc}" if tools.nvcc else "")),
    ]
    if mpi.is_open_mpi and os.getuid() == 0:
        table.append(
            ("as root, for mpirun", "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1")
        )
    return with_proofs(table, proofs) + [("missing", line) for line in missing(lane, mpi, proofs)]


VERSIONS = """
import json, platform, sys
from importlib.metadata import PackageNotFoundError, version
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def with_proofs(table: Rows, proofs: dict[str, dict]) -> Rows:
    """The table with the test results of this run."""
    facts = proofs["horovodrun --gloo"]
    operations = {"Gloo": facts["gloo_built"], "MPI": facts["mpi_built"], "NCCL": facts["nccl_built"]}
    proved = [
        ("operations", ", ".join(name for name, is_built in operations.items() if is_built)),
        ("tested with 2 ranks", ", ".join(proofs)),
    ]
    kept = [tuple(row) for row in table if row[0] not in dict(proved)]
    at = next((i for i, row in enumerate(kept) if row[0] == "missing"), len(kept))
    return kept[:at] + proved + kept[at:]


def missing(lane: Lane, mpi: Mpi, proofs: dict[str, dict]) -> list[str]:
    """Optional parts that are missing, and the packages that provide them."""
    lines = []
    if not mpi.there:
        lines.append(
            "MPI (horovodrun --mpi, mpirun): apt-get install libopenmpi-dev openmpi-bin; launch/setup again"
        )
    if shutil.which("ssh") is None:
        lines.append("ssh, for ranks on other hosts: apt-get install openssh-client")
    if lane.cuda_major and "NCCL" not in proofs:
        lines.append(
            f"NCCL was not tested: 2 ranks need 2 GPUs, torch sees {proofs['horovodrun --gloo']['gpus']}"
        )
    return lines


def render(table: Rows) -> str:
    width = max(len(name) for name, _ in table)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in table)
