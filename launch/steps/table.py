"""The table that set-up prints at the end."""

import json
import os
import shutil
from collections.abc import Sequence

from steps.horovod import Build
from steps.lanes import Lane
from steps.machine import Gpu, Tools
from steps.mpi import Mpi
from steps.place import PATCHES, Place
from steps.process import ask

Rows = list[tuple[str, str]]
OLDEST_DRIVER = {13: 580, 11: 450}  # CUDA major -> NVIDIA driver branch that runs it


def rows(
    place: Place,
    lane: Lane,
    tools: Tools,
    mpi: Mpi,
    build: Build,
    proofs: dict[str, dict],
    gpus: Sequence[Gpu],
) -> Rows:
    names = ("torch", "torchvision", "nvidia-dali-cuda130", "nvidia-dali-cuda110", "mpi4py")
    versions = json.loads(ask([place.python, "-c", VERSIONS, *names]) or "{}")
    dali = versions.get("nvidia-dali-cuda130") or versions.get("nvidia-dali-cuda110") or "-"
    table = [
        ("lane", lane.name),
        ("Python", versions.get("python", "-")),
        ("torch, torchvision", f"{versions.get('torch', '-')}, {versions.get('torchvision', '-')}"),
        ("DALI", dali),
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
    return with_proofs(table, proofs) + [("missing", line) for line in missing(lane, mpi, proofs, gpus)]


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


def missing(lane: Lane, mpi: Mpi, proofs: dict[str, dict], gpus: Sequence[Gpu]) -> list[str]:
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
    for gpu in gpus[:1]:
        branch = gpu.driver.partition(".")[0]
        oldest = OLDEST_DRIVER.get(lane.cuda_major, 0)
        if branch.isdigit() and int(branch) < oldest:
            cuda = f"CUDA {lane.cuda_major} (>= {oldest}, here {gpu.driver})"
            lines.append(f"an NVIDIA driver for {cuda}: apt-get install nvidia-driver")
    return lines


def render(table: Rows) -> str:
    width = max(len(name) for name, _ in table)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in table)
