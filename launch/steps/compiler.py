"""Choose the C++ compiler: CXX, else the first one found that is known to build Horovod."""

import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from steps.process import Lacking, Missing, ask, say

NEWEST_TRIED = 16  # g++ version; see docs/setup.md


@dataclass(frozen=True)
class GccRange:
    """The major versions of g++ that build a lane's Horovod; versions of clang are not checked."""

    oldest: int
    newest: int | None = None  # None: no upper limit, but known versions are preferred

    def __str__(self) -> str:
        return f"{self.oldest} to {self.newest}" if self.newest else f">= {self.oldest}"

    def allows(self, major: int) -> bool:
        return self.oldest <= major <= (self.newest or major)

    def knows(self, major: int) -> bool:
        return self.oldest <= major <= (self.newest or NEWEST_TRIED)


@dataclass(frozen=True)
class Compiler:
    command: str  # path, possibly with a wrapper: "/usr/bin/ccache g++"
    version: str  # first line of --version
    gcc: int | None  # major version; None: not GCC

    @property
    def name(self) -> str:
        return f"g++ {self.gcc}" if self.gcc else self.version

    @property
    def c_compiler(self) -> str | None:
        """The C compiler next to it, which CMake needs too: gcc-12 for g++-12."""
        folder, name = os.path.split(self.command)
        other = {"g++": "gcc", "c++": "cc", "clang++": "clang"}
        found = re.fullmatch(r"(.*?)(clang\+\+|g\+\+|c\+\+)(.*)", name)
        beside = os.path.join(folder, f"{found[1]}{other[found[2]]}{found[3]}") if found and folder else ""
        return beside if os.access(beside, os.X_OK) else None


def look_at(name: str) -> Compiler | None:
    """The compiler with this name, path or command ("ccache g++"), if it runs."""
    first, *more = shlex.split(name) or [""]
    path = shutil.which(first) if first else None
    command = [path, *more]
    version = (ask([*command, "--version"]) or "").partition("\n")[0] if path else ""
    if not version:
        return None
    is_clang = "clang" in version.lower()
    major = None if is_clang else int((ask([*command, "-dumpversion"]) or "0").partition(".")[0])
    return Compiler(shlex.join(command), version, major)


def choose(gcc: GccRange, environ: Mapping[str, str]) -> Compiler:
    """The compiler to build Horovod with; logs a line if it is not the default. Raises Missing."""
    if asked := environ.get("CXX"):
        named = look_at(asked)
        if named is None:
            raise Missing(f"CXX={asked} is not a working compiler: set another, or none: `CXX= launch/setup`")
        if named.gcc and not gcc.allows(named.gcc):
            raise Lacking(f"CXX={asked} is {named.name}, wanted {gcc}", wanted_package(gcc))
        return named
    default = next((found for name in ("c++", "g++", "clang++") if (found := look_at(name))), None)
    if default and (default.gcc is None or gcc.knows(default.gcc)):
        return default
    for other in installed(gcc):
        seen = f"the default compiler is {default.name}" if default else "no c++ or g++ found"
        known = f"g++ {gcc.oldest} to {gcc.newest or NEWEST_TRIED}"
        say(f"{seen}; {known} are known to work: using {other.command}")
        return other
    if default is None:
        raise Lacking("no C++ compiler", "g++")
    if gcc.allows(default.gcc):
        say(f"{default.name} is newer than any tested version (g++ {NEWEST_TRIED}); trying it")
        return default
    raise Lacking(f"{default.name}, wanted {gcc} (set CXX=/path/to/g++ to use another)", wanted_package(gcc))


def installed(gcc: GccRange) -> Iterator[Compiler]:
    """Installed versions of g++, other than the default, that are known to work, newest first."""
    for major in range(gcc.newest or NEWEST_TRIED, gcc.oldest - 1, -1):
        found = look_at(f"g++-{major}")
        if found:
            yield found


def wanted_package(gcc: GccRange) -> str:
    return f"g++-{gcc.newest or gcc.oldest}"
