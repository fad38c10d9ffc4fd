"""One Debian machine: a root folder over layers, and commands that run in it in namespaces of their own.

Every command has its own mount, process, IPC and host name namespace. Whatever it mounts or leaves running
ends with it, and it ends with this program, even where this program is killed: there is nothing to undo.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from machines.cells import HOMES, Mount

PATH = "/usr/local/bin:/usr/bin:/bin"
SIGN_OF_LIFE_S = 20
STAGE_LIMIT_S = 3600  # a quickstart takes 7 minutes on two idle cores of the slowest machine so far


class Ended(Exception):
    """A command of the harness itself failed; the line says which, and where its log is."""


def say(line: str) -> None:
    print(f"machines: {line}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Bind:
    """A folder of the host's, seen in the machine."""

    source: Path
    target: str
    read_only: bool = True


@dataclass(frozen=True)
class Machine:
    """The layers that it stands on, lowest last, and the folder that takes all that is written."""

    folder: Path
    layers: tuple[Path, ...]

    @property
    def written(self) -> Path:
        return self.folder / "written"

    def finished(self) -> tuple[Path, ...]:
        """This machine as the layers of another."""
        return (self.written, *self.layers)

    def make(self) -> None:
        """Its folders; where overlays cannot be mounted, a copy of all that it stands on."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("root", "work"):
            (self.folder / name).mkdir(parents=True)
        if overlays_work(self.folder.parent):
            self.written.mkdir()
        else:
            copy = ["cp", "-a", "--reflink=auto", str(self.layers[0]), str(self.written)]
            subprocess.run(copy, check=True)

    def mount_root(self) -> list[str]:
        root = str(self.folder / "root")
        if not overlays_work(self.folder.parent):
            return ["mount", "--bind", str(self.written), root]
        layers = ":".join(map(str, self.layers))
        options = f"lowerdir={layers},upperdir={self.written},workdir={self.folder / 'work'}"
        return ["mount", "-t", "overlay", "-o", options, "overlay", root]

    def script(
        self,
        words: Sequence[str],
        *,
        user: str = "root",
        environ: Mapping[str, str],
        binds: Sequence[Bind] = (),
        mounts: Sequence[Mount] = (),
    ) -> str:
        """The shell script that mounts everything and runs the words; for a process in fresh namespaces."""
        root = str(self.folder / "root")
        steps = [
            self.mount_root(),
            ["mount", "-t", "proc", "proc", f"{root}/proc"],
            ["mount", "-t", "sysfs", "-o", "ro", "sysfs", f"{root}/sys"],
            ["mount", "-t", "devpts", "-o", "newinstance,ptmxmode=0666", "devpts", f"{root}/dev/pts"],
            ["mount", "-t", "tmpfs", "-o", "mode=1777", "shm", f"{root}/dev/shm"],
            ["cp", "-L", "/etc/resolv.conf", f"{root}/etc/resolv.conf"],
            ["hostname", "machine"],
        ]
        for bind in binds:
            steps.append(["mkdir", "-p", root + bind.target])
            steps.append(["mount", "--bind", str(bind.source), root + bind.target])
            if bind.read_only:
                steps.append(["mount", "-o", "remount,bind,ro", root + bind.target])
        for mount in mounts:
            target = root + mount.path
            if mount.tmpfs:
                steps.append(["mount", "-t", "tmpfs", "-o", mount.options, "tmpfs", target])
            else:
                steps.append(["mount", "--bind", target, target])
                steps.append(["mount", "-o", f"remount,bind,{mount.options}", target])
        identity = ["setpriv", "--reuid", user, "--regid", user, "--init-groups"]
        variables = [f"{name}={value}" for name, value in environ.items()]
        steps.append(["chroot", root, *identity, "env", "-i", *variables, *words])
        # `exit` last: the shell stays as process 1 and reaps what the commands leave, as an init does
        return "\n".join(["set -e", *map(shlex.join, steps), "exit 0"])

    def run(
        self,
        label: str,
        words: Sequence[str],
        *,
        log: Path,
        timeout_s: float = STAGE_LIMIT_S,
        **settings: object,
    ) -> int:
        """The exit code of the words, their output at the end of the log; -9 where the time was up first."""
        return run(label, in_namespaces(self.script(words, **settings)), log=log, timeout_s=timeout_s)


def in_namespaces(script: str) -> list[str]:
    """The script's argv, so made that killing it, or its parent's death, kills all that it started."""
    die_with_parent = ["setpriv", "--pdeathsig", "KILL"]
    unshare = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child"]
    return [*die_with_parent, *unshare, "sh", "-c", script]


def run(label: str, argv: Sequence[str], *, log: Path, timeout_s: float = STAGE_LIMIT_S) -> int:
    """Run a command with its output in the log, and the log's last line on stderr now and then."""
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("ab") as out:
        child = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            next_sign_s = SIGN_OF_LIFE_S
            while child.poll() is None:
                elapsed_s = time.monotonic() - start
                if elapsed_s > timeout_s:
                    return -signal.SIGKILL
                if elapsed_s > next_sign_s:
                    say(f"{label}, {elapsed_s:.0f} s: {last_line(log)[:100]}")
                    next_sign_s += SIGN_OF_LIFE_S
                try:
                    child.wait(0.5)
                except subprocess.TimeoutExpired:
                    pass
            return child.returncode
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def must(code: int, log: Path) -> None:
    if code != 0:
        raise Ended(f"{last_line(log)} (exit {code}); log: {log}")


def last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


@cache
def overlays_work(folder: Path) -> bool:
    """Whether an overlay over this folder can be mounted: not where it lies on an overlay itself."""
    trial = folder / "overlay-trial"
    names = [trial / name for name in ("lower", "written", "work", "root")]
    for name in names:
        name.mkdir(parents=True, exist_ok=True)
    options = "lowerdir={},upperdir={},workdir={}".format(*names)
    mount = ["unshare", "--mount", "mount", "-t", "overlay", "-o", options, "overlay", str(names[-1])]
    works = subprocess.run(mount, capture_output=True).returncode == 0
    shutil.rmtree(trial)
    return works


def user_environ(user: str, environ: Mapping[str, str]) -> dict[str, str]:
    """What a login gives, and then what is said."""
    path = PATH if user != "root" else f"/usr/local/sbin:/usr/sbin:/sbin:{PATH}"
    return {"HOME": HOMES[user], "USER": user, "PATH": path, "LANG": "C.UTF-8", **environ}
