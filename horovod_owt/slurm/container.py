"""The container that a job's ranks run in, by Pyxis or Apptainer. The batch process runs outside of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from horovod_owt.errors import ConfigError


@dataclass(frozen=True)
class Container:
    """Without an image: none."""

    pyxis: str = ""  # image, for the srun of a site that has Pyxis
    apptainer: str = ""  # image
    mounts: str = ""  # SRC:DST,...

    def __bool__(self) -> bool:
        return bool(self.pyxis or self.apptainer)

    def wrapped(self, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` in Apptainer's container; unchanged without one."""
        if not self.apptainer:
            return list(command)
        binds = ["--bind", self.mounts] if self.mounts else []
        return [_apptainer(), "exec", "--nv", *binds, self.apptainer, *command]

    def srun_options(self) -> list[str]:
        """Options of Pyxis. It starts in the image's folder: relative paths would lead into the image."""
        if not self.pyxis:
            return []
        here = os.getcwd()
        mounts = ",".join(filter(None, [f"{here}:{here}", self.mounts]))
        options = {"image": self.pyxis, "mounts": mounts, "workdir": here}
        return [f"--container-{name}={value}" for name, value in options.items()]

    def environment(self, env: Mapping[str, str]) -> dict[str, str]:
        """Variables to add for the ranks: the image's packages, not those in a home that is mounted."""
        return {"PYTHONNOUSERSITE": "1"} if self and "PYTHONNOUSERSITE" not in env else {}


NO_CONTAINER = Container()


def _apptainer() -> str:
    """The program's name: Singularity has the same command line."""
    for name in ("apptainer", "singularity"):
        if shutil.which(name):
            return name
    raise ConfigError(
        "neither apptainer nor singularity on PATH",
        wanted="one of them on the job's nodes",
        fix="--module apptainer, or what the site calls it",
    )
