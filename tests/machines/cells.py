"""What is tried: a cell is one machine, one way to use it, and how that ought to end. Data only."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

REPO = Path(__file__).resolve().parents[2]
SUITES = {"bookworm": "Debian 12", "trixie": "Debian 13", "sid": "Debian sid"}
STAGES = ("setup", "quickstart", "tests")  # launch/setup; make quickstart; tests/unit and tests/setup
HOMES = {"user": "/home/user", "root": "/root"}
WANTED_TOP1 = 90.0  # percent, the quickstart's own mark


@dataclass(frozen=True)
class Mount:
    """Something mounted while the commands run: a tmpfs, or the folder itself with other options."""

    path: str
    options: str
    tmpfs: bool = False


@dataclass(frozen=True)
class Cell:
    name: str
    suite: str
    what: str  # what is special about it, for the table
    stages: tuple[str, ...] = ("setup",)
    user: str = "user"
    start: str | None = None  # the cell on whose finished machine this one goes on
    lacking: tuple[str, ...] = ()  # of the packages that docs/setup.md names, those that are not installed
    packages: tuple[str, ...] = ()  # installed beside those
    python: str = "python3"
    host_python: bool = False  # that Python is none of Debian's but this host's, mounted at its own path
    environ: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    umask: str = "022"
    before: str = ""  # shell commands of the user, before the first stage
    mounts: tuple[Mount, ...] = ()
    checkout: str = ""  # absolute; default: horovod_owt in the home
    venv: str = ""  # absolute; default: .venv in the checkout
    refused: str | None = None  # a part of the one line that setup ends with, exit 2; None: all succeeds

    @property
    def home(self) -> str:
        return HOMES[self.user]

    @property
    def checkout_path(self) -> str:
        return self.checkout or f"{self.home}/horovod_owt"

    @property
    def venv_path(self) -> str:
        return self.venv or f"{self.checkout_path}/.venv"


def documented_packages(setup_md: Path = REPO / "docs" / "setup.md") -> tuple[str, ...]:
    """What docs/setup.md tells a new user to install."""
    found = re.search(r"^apt-get install (.+)$", setup_md.read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f"{setup_md} names no packages: a line `apt-get install ...` is wanted")
    return tuple(found[1].split())


def whole_systems() -> Iterable[Cell]:
    yield Cell("debian-13", "trixie", "as it comes", ("quickstart",))
    yield Cell("debian-13-tests", "trixie", "unit and setup tests", ("tests",), start="debian-13")
    yield Cell("debian-13-root", "trixie", "as root", ("quickstart",), user="root")
    yield Cell("debian-12", "bookworm", "as it comes", ("quickstart",))
    yield Cell("debian-sid", "sid", "as it comes", ("quickstart",))


def compilers() -> Iterable[Cell]:
    """On finished machines: pip has nothing to do, Horovod is built by another compiler."""
    chosen = {
        "bookworm": ("g++-11", "clang-14"),
        "trixie": ("g++-12", "g++-13", "clang-19"),
        "sid": ("g++-15", "clang-21"),
    }
    starts = {"bookworm": "debian-12", "trixie": "debian-13", "sid": "debian-sid"}
    for suite, names in chosen.items():
        for package in names:
            cxx, cc = package.replace("clang", "clang++"), package.replace("g++", "gcc")
            yield Cell(
                f"{suite}-{package}",
                suite,
                f"CC={cc} CXX={cxx}",
                start=starts[suite],
                packages=(package,),
                environ=MappingProxyType({"CC": cc, "CXX": cxx}),
            )


def mpis() -> Iterable[Cell]:
    open_mpi, mpich = ("libopenmpi-dev", "openmpi-bin"), ("libmpich-dev", "mpich")
    for suite, start in (("bookworm", "debian-12"), ("trixie", "debian-13"), ("sid", "debian-sid")):
        yield Cell(f"{suite}-open-mpi", suite, "Debian's Open MPI", start=start, packages=open_mpi)
        yield Cell(f"{suite}-mpich", suite, "Debian's MPICH", start=start, packages=mpich)


def pythons() -> Iterable[Cell]:
    """Versions that no Debian has; 3.11, 3.13 and 3.14 come with the Debians above."""
    for version, suite in (("3.10", "bookworm"), ("3.12", "trixie")):
        yield Cell(
            f"python-{version}",
            suite,
            f"Python {version}, not Debian's",
            ("setup", "quickstart"),
            user="root",
            python=f"python{version}",
            host_python=True,
        )


def odd_places() -> Iterable[Cell]:
    path = "/home/user/Übung mit Leerzeichen"
    yield Cell(
        "odd-path",
        "trixie",
        "checkout and cache in a path with blanks and non-ASCII letters",
        ("quickstart",),
        checkout=f"{path}/horovod_owt",
        environ=MappingProxyType({"XDG_CACHE_HOME": f"{path}/Zwischenspeicher"}),
    )
    again = {"start": "debian-13", "before": "rm -rf .venv quickstart"}  # with Horovod's wheel in the cache
    yield Cell("umask-077", "trixie", "umask 077", ("quickstart",), umask="077", **again)
    yield Cell(
        "lang-c",
        "trixie",
        "LANG=C LC_ALL=C",
        ("quickstart",),
        environ=MappingProxyType({"LANG": "C", "LC_ALL": "C"}),
        **again,
    )
    yield Cell(
        "noexec-checkout",
        "trixie",
        "checkout on a noexec mount, VENV= elsewhere",
        ("quickstart",),
        start="debian-13",
        mounts=(Mount("/srv/horovod_owt", "noexec"),),
        checkout="/srv/horovod_owt",
        venv="/home/user/owt",
    )


def refusals() -> Iterable[Cell]:
    """What is refused before anything is downloaded."""
    for suite in SUITES:
        yield Cell(
            f"{suite}-no-compiler",
            suite,
            "no compiler",
            lacking=("g++",),
            refused="no C++ compiler: apt-get install g++",
        )
    yield Cell(
        "no-cmake", "trixie", "no CMake", lacking=("cmake",), refused="no CMake: apt-get install cmake"
    )
    yield Cell(
        "no-venv",
        "trixie",
        "no venv module",
        lacking=("python3-venv",),
        refused="lacks the venv module: apt-get install python3.13-venv",
    )
    yield Cell(
        "no-headers",
        "trixie",
        "no Python headers",
        lacking=("python3-dev",),
        refused="lacks its headers (Python.h): apt-get install python3.13-dev",
    )
    yield Cell(
        "python-3.9",
        "bookworm",
        "Python 3.9, not Debian's",
        user="root",
        python="python3.9",
        host_python=True,
        refused="Python >= 3.10 is wanted",
    )
    yield Cell(
        "python-3.15",
        "sid",
        "Python 3.15, for which torch has no wheels",
        packages=("python3.15-venv", "python3.15-dev"),
        python="python3.15",
        refused="has wheels for Python 3.10 to 3.14",
    )
    srv = "/srv/horovod_owt"
    for name, options, venv, refused in (
        (
            "noexec",
            "noexec",
            "",
            f"{srv} is mounted noexec, no library loads from it: choose",
        ),
        ("read-only", "ro", "", f"{srv} is not writable: choose another folder with --venv"),
        (
            "read-only-checkout",
            "ro",
            "/home/user/owt",
            "pip puts horovod_owt.egg-info there: copy it to",
        ),
    ):
        yield Cell(
            name,
            "trixie",
            f"checkout mounted {options}{', VENV= elsewhere' if venv else ''}",
            mounts=(Mount(srv, options),),
            checkout=srv,
            venv=venv,
            refused=refused,
        )
    yield Cell(
        "full-home",
        "trixie",
        "a home without room",
        mounts=(Mount("/home/user", "size=64m,mode=755,uid=1000,gid=1000", tmpfs=True),),
        checkout="/srv/horovod_owt",
        venv="/home/user/owt",
        refused="0.1 GB free for /home/user/owt and /home/user/.cache/horovod_owt",
    )


CELLS = {
    cell.name: cell
    for group in (whole_systems, compilers, mpis, pythons, odd_places, refusals)
    for cell in group()
}
