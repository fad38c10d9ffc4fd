"""Find a CUDA toolkit to build Horovod with: this machine's, or one made of pip's packages."""

import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from steps import packages
from steps.lanes import Lane
from steps.place import Place, digest, file_digest
from steps.process import Failed, Lacking, Missing, ask

CUDA_DEFAULT = Path("/usr/local/cuda")
HEADERS = ("include/cuda_runtime.h", "targets/x86_64-linux/include/cuda_runtime.h")
# Together they are what Horovod's build needs of a toolkit. Before CUDA 13 pip's nvcc package has no nvcc.
PIP_PACKAGES = (
    "nvidia-cuda-nvcc",
    "nvidia-cuda-crt",
    "nvidia-nvvm",
    "nvidia-cuda-cccl",
    "nvidia-cuda-runtime",
    "nvidia-nvtx",
)


@dataclass(frozen=True)
class Toolkit:
    root: Path
    release: str  # of its nvcc: "13.0"

    @property
    def major(self) -> int:
        return int(self.release.partition(".")[0])


def look_at(root: Path) -> Toolkit | None:
    """The toolkit at this root: an nvcc with its headers. A wrapper script on PATH is no toolkit."""
    if not any((root / header).exists() for header in HEADERS):
        return None
    release = re.search(r"release (\d+\.\d+)", ask([root / "bin" / "nvcc", "--version"]) or "")
    return Toolkit(root, release[1]) if release else None


def find(place: Place, lane: Lane, environ: Mapping[str, str]) -> Toolkit:
    """The toolkit to build this lane's Horovod with; raises Missing or Lacking if there is none.

    One that CUDA_HOME names is taken or refused; else the first that has the lane's CUDA release.
    """
    for name in ("HOROVOD_CUDA_HOME", "CUDA_HOME"):
        if named := environ.get(name):
            found = look_at(Path(named))
            if found and found.major == lane.cuda_major:
                return found
            seen = f"has CUDA {found.release}" if found else "has no nvcc with its headers (cuda_runtime.h)"
            raise Missing(
                f"{name}={named} {seen}, wanted CUDA {lane.cuda_major}: name such a toolkit, or none: "
                f"`{name}= launch/setup`"
            )
    others = []
    for root in candidates(place, lane):
        found = look_at(root)
        if found and found.major == lane.cuda_major:
            return found
        if found:
            others.append(f"CUDA {found.release} in {found.root}")
    only = f", only {', '.join(others)}" if others else ""
    ways = ["set CUDA_HOME to one"]
    if lane.toolkit_from_pip:
        ways.append(f"launch/setup --lane {lane.name} --cuda-from-pip")
    ways.append("add NVIDIA's apt repository")
    raise Lacking(
        f"no CUDA {lane.cuda_major} toolkit (nvcc and its headers){only} ({', or '.join(ways)})",
        lane.toolkit_package,
    )


def candidates(place: Place, lane: Lane) -> Iterator[Path]:
    """Where a toolkit may be, in order of preference."""
    yield pip_root(place)
    if nvcc := shutil.which("nvcc"):
        yield Path(nvcc).resolve().parents[1]
    yield CUDA_DEFAULT
    yield from sorted(CUDA_DEFAULT.parent.glob(f"cuda-{lane.cuda_major}.*"), reverse=True)


# pip's toolkit


def pip_root(place: Place) -> Path:
    return place.venv / "cuda" / "nvidia" / "cu13"


def check_pip_has(lane: Lane) -> None:
    """Raise Missing for a lane whose toolkit pip does not have whole."""
    if not lane.toolkit_from_pip:
        wanted = (
            f"install {lane.toolkit_package} from NVIDIA's apt repository"
            if lane.cuda_major
            else "leave it out"
        )
        raise Missing(f"--cuda-from-pip: pip has no CUDA toolkit for the {lane.name} lane: {wanted}")


def install_from_pip(place: Place, lane: Lane) -> Toolkit:
    """NVIDIA's packages in a folder of the virtual environment, laid out as the build expects a toolkit."""
    pins = [file_digest(file) for file in sorted(lane.constraints.parent.glob("*.txt"))]
    inputs = digest(PIP_PACKAGES, pins)
    found = look_at(pip_root(place))
    if found and place.is_done("toolkit", inputs):
        return found
    place.mark("toolkit", None)
    target = place.venv / "cuda"
    shutil.rmtree(target, ignore_errors=True)
    words = ["--no-deps", "--target", target, "-c", lane.constraints, *PIP_PACKAGES]
    packages.pip(place, "toolkit", "install", *words)
    add_links(pip_root(place))
    found = look_at(pip_root(place))
    if found is None:
        raise Failed(f"pip's CUDA packages in {pip_root(place)} are no toolkit; log: {place.log('toolkit')}")
    place.mark("toolkit", inputs)
    return found


def add_links(root: Path) -> None:
    """What the wheels, which are for running programs, leave out: lib64, and libraries without a version."""
    (root / "lib64").symlink_to("lib")
    for library in (root / "lib").glob("lib*.so.*"):
        plain = library.with_name(library.name.partition(".so")[0] + ".so")
        if not plain.exists():
            plain.symlink_to(library.name)
