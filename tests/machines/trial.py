"""Try a cell: make its machine, run what a new user would run, and note how it ended."""

import shlex
import shutil
import subprocess
import time
from pathlib import Path

from machines import host, results
from machines.cells import CELLS, Cell, documented_packages
from machines.machine import Bind, Ended, Machine, must, say, user_environ
from machines.results import Result
from machines.workshop import Workshop

CLONE = "/mnt/horovod_owt"  # where a machine finds the clone to copy


class Trial:
    """One cell's machine: made, used as a new user would, and looked at afterwards."""

    def __init__(self, workshop: Workshop, cell: Cell, pip: host.Pip):
        self.workshop, self.cell, self.pip = workshop, cell, pip
        self.machine = Machine(workshop.cells / cell.name, layers(workshop, cell))
        self.log = workshop.log(cell.name)
        self.python = host.python(cell.python) if cell.host_python else Path(cell.python)
        said = {**pip.environ, "PIP_CACHE_DIR": "/var/cache/pip", **cell.environ}
        self.environ = user_environ(cell.user, said)

    def run(self, commit: str) -> Result:
        date = time.strftime("%Y-%m-%d")
        if self.python is None:
            return Result.not_run(self.cell.name, date, commit, f"no {self.cell.python} on this host")
        self.log.unlink(missing_ok=True)
        try:
            self.prepare()
        except Ended as fault:
            return Result.not_run(self.cell.name, date, commit, str(fault), as_wanted=False)
        code, seconds = 0, {}
        for stage in self.cell.stages:
            say(f"{self.cell.name}: {stage}")
            start = time.monotonic()
            code = self.inside(stage_script(self.cell, stage, self.python), mounts=self.cell.mounts)
            seconds[stage] = round(time.monotonic() - start)
            if code != 0:
                break
        said = self.log.read_text(errors="replace")
        self.inside(versions_script(self.cell, self.python))
        seen = self.log.read_text(errors="replace")[len(said) :]
        return results.judge(self.cell, date, commit, code, seconds, said, seen)

    def prepare(self) -> None:
        self.machine.make()
        self.install_packages()
        self.lay_pip_settings()
        self.lay_checkout()

    def install_packages(self) -> None:
        """Those of this cell; without gaps, the documented ones are in the layers already."""
        lacking = self.cell.lacking
        left = [name for name in documented_packages() if lacking and name not in lacking]
        if packages := (*left, *self.cell.packages):
            self.workshop.install(self.machine, self.cell.name, packages)

    def lay_pip_settings(self) -> None:
        for source, target in self.pip.files.items():
            inside = self.machine.written / target.lstrip("/")
            inside.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, inside)
        cache = self.workshop.folder / "pip"
        cache.mkdir(exist_ok=True)
        subprocess.run(["chmod", "-R", "a+rwX", str(cache)], check=True)  # root and users share it

    def lay_checkout(self) -> None:
        """The clone in its place, over the one of a machine that this one starts from."""
        cell, place = self.cell, shlex.quote(self.cell.checkout_path)
        if not cell.checkout_path.startswith(cell.home):
            own = f"install -d -o {cell.user} -g {cell.user} {place}"
            must(self.inside(own, user="root", environ=user_environ("root", {})), self.log)
        steps = [
            f"umask {cell.umask}; set -e; mkdir -p {place}; cd {place}",
            "find . -mindepth 1 -maxdepth 1 ! -name .venv ! -name quickstart -exec rm -rf {} +",
            f"cp -r {CLONE}/. .",
            cell.before,
        ]
        must(self.inside("\n".join(steps)), self.log)

    def inside(self, script: str, **settings: object) -> int:
        """Run a shell script in the machine, as the cell's user unless the settings say otherwise."""
        usual = {"user": self.cell.user, "environ": self.environ, "binds": self.binds(), "log": self.log}
        return self.machine.run(self.cell.name, ["sh", "-c", script], **{**usual, **settings})

    def binds(self) -> list[Bind]:
        """The clone, pip's cache and local indexes, and the host's Python if that is the one to be tried."""
        binds = [
            Bind(self.workshop.clone, CLONE),
            Bind(self.workshop.folder / "pip", "/var/cache/pip", read_only=False),
            *(Bind(folder, str(folder)) for folder in self.pip.folders),
        ]
        if self.cell.host_python:
            prefix = self.python.parents[1]
            binds.append(Bind(prefix, str(prefix)))
        return binds


def layers(workshop: Workshop, cell: Cell) -> tuple[Path, ...]:
    """What the cell's machine stands on: another cell's finished machine, or a Debian."""
    if cell.start is not None:
        start = CELLS[cell.start]
        return Machine(workshop.cells / start.name, layers(workshop, start)).finished()
    return workshop.base(cell.suite) if cell.lacking else workshop.documented(cell.suite)


def stage_script(cell: Cell, stage: str, python: Path) -> str:
    """What the user types for this stage."""
    if stage == "setup":
        words = [str(python), "launch/setup", *(["--venv", cell.venv] if cell.venv else [])]
    elif stage == "quickstart":
        words = ["make", "quickstart"]
        words += [f"PYTHON={python}"] if str(python) != "python3" else []
        words += [f"VENV={cell.venv}"] if cell.venv else []
    else:
        words = [f"{cell.venv_path}/bin/python", "-m", "pytest", "-q", "tests/unit", "tests/setup"]
    lines = [f"umask {cell.umask}", f"cd {shlex.quote(cell.checkout_path)}"]
    if stage == "tests":
        lines.append(f"PATH={shlex.quote(cell.venv_path + '/bin')}:$PATH")
    return "\n".join([*lines, shlex.join(words)])


def versions_script(cell: Cell, python: Path) -> str:
    """Print what this machine has, `name: version` a line; nothing for what it lacks."""
    asked = {
        "debian": "cat /etc/debian_version",
        "compiler": f"{cell.environ.get('CXX', 'c++')} --version",
        "cmake": "cmake --version",
        "python": f"{shlex.quote(str(python))} --version",
        "mpi": "mpirun --version | grep -E 'Open MPI|Version:' | tr -s ' ' | sed 's/^ //'",
    }
    return "\n".join(f'echo "{name}: $({words} 2>/dev/null | head -n 1)"' for name, words in asked.items())
