"""The tools that build Horovod: compiler, CMake, make, and a CUDA toolkit."""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass

from steps import compiler, toolkit
from steps.compiler import Compiler
from steps.lanes import Lane
from steps.place import Place
from steps.process import Lacking, Missing, ask
from steps.toolkit import Toolkit


@dataclass(frozen=True)
class Tools:
    cxx: Compiler
    cmake: str
    cuda: Toolkit | None = None

    @property
    def nvcc(self) -> str:
        """Part of the wheel's key."""
        return f"release {self.cuda.release}" if self.cuda else ""


def check(lane: Lane, place: Place, environ: Mapping[str, str], *, toolkit_later: bool = False) -> Tools:
    """Find the tools before anything is downloaded; reports all missing ones at once.

    With `toolkit_later` a CUDA toolkit is installed with the packages.
    """
    lacking = []  # (what was seen and wanted, Debian package)
    cxx, cuda = None, None
    try:
        cxx = compiler.choose(lane.gcc, environ)
    except Lacking as fault:
        lacking.append((fault.seen, fault.package))
    cmake = (ask(["cmake", "--version"]) or "").partition("\n")[0]
    found = re.search(r"(\d+)\.(\d+)", cmake)
    if not found:
        lacking.append(("no CMake", "cmake"))
    elif (int(found[1]), int(found[2])) < (3, 13):
        lacking.append((f"{cmake}, wanted >= 3.13", "cmake"))
    if shutil.which("make") is None:
        lacking.append(("no make", "make"))
    if lane.cuda_major is not None and not toolkit_later:
        try:
            cuda = toolkit.find(place, lane, environ)
        except Lacking as fault:
            lacking.append((fault.seen, fault.package))
    if lacking:
        raise Missing(
            f"{'; '.join(what for what, _ in lacking)}: "
            f"apt-get install {' '.join(package for _, package in lacking)}"
        )
    return Tools(cxx, cmake, cuda)
