"""The folder in which machines are made, and what is kept in it from run to run."""

import fcntl
import hashlib
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from machines import host
from machines.cells import CELLS, REPO, Cell, documented_packages
from machines.machine import Bind, Ended, Machine, must, run, say, user_environ

KEPT_DAYS = 7  # a Debian's root and packages are made anew after this long
ROOM_GB = 20  # for a root, its packages, pip's cache, and the 13 GB that setup checks for inside


class Workshop:
    """The folder with roots, caches, logs and results: ~/.cache/horovod_owt/machines."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.cells = folder / "cells"
        self.clone = folder / "clone"

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One run at a time; a second one waits."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"another run is at work in {self.folder}; waiting for its end")
                fcntl.flock(lock, fcntl.LOCK_EX)
            self.clean(set())  # what a run that was killed has left; nothing of it is mounted or running
            yield

    def check_room(self) -> None:
        """Before anything is made: else setup inside would fail, through no fault of its own."""
        free_gb = shutil.disk_usage(self.folder).free / 1e9
        if free_gb < ROOM_GB:
            raise Ended(f"{free_gb:.1f} GB free for {self.folder}, wanted {ROOM_GB} GB: free some space")

    def clean(self, wanted: set[str]) -> None:
        """Remove the machines of cells but the wanted and the kept ones."""
        for machine in self.cells.glob("*"):
            if machine.name not in wanted and not self.keeps(machine.name):
                shutil.rmtree(machine)

    def keep(self, cell: Cell) -> None:
        """Keep a finished machine for a later run's cells to start from."""
        (self.cells / cell.name / "kept").touch()

    def keeps(self, name: str) -> bool:
        """Whether that cell's machine is there, and the Debian that it stands on is still the same."""
        mark = self.cells / name / "kept"
        return mark.exists() and is_newer(mark, self.documented_folder(CELLS[name].suite))

    def forget(self) -> None:
        for kept in self.cells.glob("*/kept"):
            kept.unlink()
        self.clean(set())

    def clone_checkout(self) -> str:
        """A clean clone of this checkout's HEAD, for the machines to copy; its commit."""
        shutil.rmtree(self.clone, ignore_errors=True)
        subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(REPO), str(self.clone)], check=True)
        commit = ["git", "-C", str(self.clone), "rev-parse", "--short", "HEAD"]
        return subprocess.run(commit, check=True, capture_output=True, text=True).stdout.strip()

    @contextmanager
    def made_once(self, kept: Path) -> Iterator[Path | None]:
        """Give a folder to fill, which then becomes `kept`; None where that one is there and young enough."""
        if is_young(kept):
            yield None
            return
        new = kept.with_name(f"{kept.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        yield new
        shutil.rmtree(kept, ignore_errors=True)
        new.rename(kept)
        kept.touch()

    def base(self, suite: str) -> tuple[Path, ...]:
        """The layers of a Debian from debootstrap, with this host's apt settings and an ordinary user."""
        kept, log = self.folder / "debian" / suite, self.log(suite)
        with self.made_once(kept) as new:
            if new is not None:
                say(f"{suite}: debootstrap")
                root = new / "written"
                words = [
                    "debootstrap",
                    "--variant=minbase",
                    suite,
                    str(root),
                    *filter(None, [host.debian_mirror()]),
                ]
                must(run(f"{suite}: debootstrap", words, log=log), log)
                (root / "etc" / "apt" / "apt.conf.d" / "90host").write_text(host.apt_settings())
                # thrown away before any power cut: no file needs to be on the disk
                (root / "etc" / "dpkg" / "dpkg.cfg.d" / "unsafe-io").write_text("force-unsafe-io\n")
                (root / "etc" / "hosts").write_text("127.0.0.1 localhost\n127.0.1.1 machine\n")
                useradd = ["chroot", str(root), "useradd", "--create-home", "--uid", "1000", "user"]
                must(run(f"{suite}: useradd", useradd, log=log), log)
        return (kept / "written",)

    def documented(self, suite: str) -> tuple[Path, ...]:
        """The layers of that Debian with the packages that docs/setup.md names."""
        base, kept = self.base(suite), self.documented_folder(suite)
        with self.made_once(kept) as new:
            if new is not None:
                machine = Machine(new, base)
                machine.make()
                self.install(machine, kept.name, documented_packages())
        return (kept / "written", *base)

    def documented_folder(self, suite: str) -> Path:
        packages = hashlib.sha256(" ".join(documented_packages()).encode()).hexdigest()
        return self.folder / "debian" / f"{suite}-{packages[:8]}"

    def install(self, machine: Machine, name: str, packages: tuple[str, ...]) -> None:
        say(f"{name}: apt-get install {' '.join(packages)}")
        archives = self.folder / "apt"
        archives.mkdir(exist_ok=True)
        script = f"apt-get -qq update && apt-get -qq install {shlex.join(packages)}"
        code = machine.run(
            f"{name}: apt-get",
            ["sh", "-c", script],
            environ=user_environ("root", {"DEBIAN_FRONTEND": "noninteractive"}),
            binds=[Bind(archives, "/var/cache/apt/archives", read_only=False)],
            log=self.log(name),
        )
        must(code, self.log(name))


def is_young(folder: Path) -> bool:
    return folder.exists() and time.time() - folder.stat().st_mtime < 86400 * KEPT_DAYS


def is_newer(mark: Path, folder: Path) -> bool:
    return is_young(folder) and mark.stat().st_mtime > folder.stat().st_mtime
