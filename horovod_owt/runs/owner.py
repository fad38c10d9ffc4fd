"""The lock of a run folder, which works on network file systems and expires when its owner dies.

    RUN/owner/00000003.json     the third owner; it renews the file's mtime every few seconds

Each owner creates a file with the next number, which only one process can do (O_EXCL works on NFS and Lustre,
where flock may be missing or local to a host). The highest number owns the folder. An owner that releases it
marks its file, which the next owner removes. Numbers are never reused, so no process can remove a lock that
another has just taken over, as can happen with a single lock file.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread
from types import TracebackType

from horovod_owt.errors import ConfigError
from horovod_owt.files import atomic_file
from horovod_owt.filesystem import partial_file, touch, unlink_quietly

log = logging.getLogger(__name__)

OWNER = "owner"
RENEW_S = 5.0  # between renewals of an owner's file
WATCH_S = 10.0  # how long an existing owner is observed, which may be exiting
STALE_S = 30.0  # an owner on another host that has not renewed its file for this long is dead
POLL_S = 0.25


@dataclass(frozen=True)
class Owner:
    """A process, identified across hosts: the content of an owner file."""

    host: str
    kernel: str  # boot id and PID namespace: if equal, PIDs are comparable
    pid: int
    start_ticks: int  # start time of the process after boot, because PIDs are reused
    started: str  # the same in local time, for messages
    driver: str = ""  # of an elastic job, whose owner may change
    left: bool = False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.started}"


def this_process(env: Mapping[str, str]) -> Owner:
    return Owner(
        host=socket.gethostname(),
        kernel=_kernel(),
        pid=os.getpid(),
        start_ticks=_start_ticks(os.getpid()) or 0,
        started=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        driver=elastic_driver(env),
    )


def elastic_driver(env: Mapping[str, str]) -> str:
    """The address of an elastic job's driver, the same on all its ranks; empty for other jobs."""
    if env.get("HOROVOD_ELASTIC") != "1":
        return ""
    address = env.get("HOROVOD_GLOO_RENDEZVOUS_ADDR", "").partition("/")[0]  # what follows is secret
    return f"{address}:{env.get('HOROVOD_GLOO_RENDEZVOUS_PORT')}"


def active_owner(run_dir: Path) -> Owner | None:
    """The process that owns a run folder and is alive, as far as can be told without waiting.

    A process on another host counts as alive if it has renewed its file recently.
    """
    folder = run_dir / OWNER
    try:
        number = max(_numbers(folder), default=0)
    except OSError:
        return None
    owner, renewed = _read(folder, number), _renewed(folder, number)
    if owner is None or owner.left or renewed is None:
        return None
    if owner.kernel == _kernel():
        return owner if _start_ticks(owner.pid) == owner.start_ticks else None
    silent_s = time.time() - renewed
    if not 0 <= silent_s < STALE_S:  # this host's clock may be off
        with suppress(OSError):  # the user may have no write permission
            silent_s = _now(folder) - renewed
    return owner if silent_s < STALE_S else None


class Ownership:
    """This process's ownership of a run folder, from `take` to the end of the `with` block.

    `on_loss` is called in a thread if another process has taken over the folder, because this host or its
    access to the file system hung for more than STALE_S.
    """

    def __init__(self, on_loss: Callable[[str], None] | None = None) -> None:
        self._on_loss = on_loss or _end_this_process
        self._file: Path | None = None
        self.since = 0.0  # by the file system's clock
        self._enough = Event()
        self._renewing: Thread | None = None

    def __enter__(self) -> Ownership:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    def take(self, run_dir: Path) -> None:
        """Take ownership; waits up to STALE_S to find out whether an owner on another host is alive.

        Raises ConfigError with its host, PID and start time if it is, OSError if the folder is not writable.
        """
        if self._file is not None:
            return
        folder = run_dir / OWNER
        folder.mkdir(exist_ok=True)
        me = this_process(os.environ)
        while self._file is None:
            number = _wait_for_turn(run_dir, me)
            self._file = _create(folder, number + 1, me)
        self.since = self._file.stat().st_mtime
        for older in _numbers(folder):
            if older < _number(self._file):
                unlink_quietly(_path(folder, older))
        self._enough.clear()
        self._renewing = Thread(target=self._renew, args=(run_dir, self._file), name="owner", daemon=True)
        self._renewing.start()

    def hand_over(self) -> None:
        """Hand over to the process that is now rank 0 of this elastic job, without releasing the folder."""
        if self._file is not None:
            self._file = None
            self._enough.set()
            self._renewing.join()

    def leave(self) -> None:
        """Release the folder; does nothing if this process does not own it."""
        file = self._file
        if file is None:
            return
        self.hand_over()
        try:
            left = {**json.loads(file.read_text(encoding="utf-8")), "left": True}
            with atomic_file(file) as scratch:
                scratch.write(json.dumps(left).encode())
        except (OSError, ValueError) as error:  # the next owner will notice that this process has ended
            log.warning("cannot release %s: %s", file, error)

    def _renew(self, run_dir: Path, file: Path) -> None:
        folder = file.parent
        while not self._enough.wait(RENEW_S):
            try:
                last = max(_numbers(folder), default=0)
                if last > _number(file):
                    self._on_loss(f"run folder {run_dir} was taken over by {_read(folder, last)}")
                    return
                touch(file)
            except OSError:  # a lost mount may come back; write errors are reported elsewhere
                continue


def _wait_for_turn(run_dir: Path, me: Owner) -> int:
    """The number of the last owner once it is gone, 0 if there is none; ConfigError if it is alive."""
    folder = run_dir / OWNER
    watched, since, at_first = 0, 0.0, 0.0  # the observed owner, since when, and its renewal time at first
    while True:
        number = max(_numbers(folder), default=0)
        owner, renewed = _read(folder, number), _renewed(folder, number)
        if not number or (owner and owner.left):
            return number
        if owner and (why := _why_released(owner, me)):
            log.warning("run folder %s taken over from %s: %s", run_dir, owner, why)
            return number
        if number != watched:
            watched, since, at_first = number, time.monotonic(), renewed
        elif renewed is not None and time.monotonic() > since + WATCH_S:  # None: the next owner removed it
            if renewed != at_first or (owner and owner.kernel == me.kernel):
                raise ConfigError(
                    f"run folder {run_dir} is in use by {owner}",
                    wanted="one run at a time in a folder",
                    fix="wait until it ends, stop it, or use another --run-dir",
                )
            silent_s = _now(folder) - renewed
            if silent_s >= STALE_S:
                who = owner or "an unknown process"
                log.warning(
                    "run folder %s taken over from %s: no sign of life for %d s", run_dir, who, silent_s
                )
                return number
        time.sleep(POLL_S)


def _why_released(owner: Owner, me: Owner) -> str:
    """Why an owner is known to have released the folder; empty if it may be alive."""
    if owner.kernel == me.kernel and _start_ticks(owner.pid) != owner.start_ticks:
        return "it has ended"
    return "another rank of this job is rank 0 now" if me.driver and owner.driver == me.driver else ""


def _create(folder: Path, number: int, owner: Owner) -> Path | None:
    """Create this owner's file; None if another process was first."""
    path = _path(folder, number)
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return None
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(owner)) + "\n")
    except OSError:  # a full disk: leave no owner file without content
        unlink_quietly(path)
        raise
    if max(_numbers(folder)) > number:  # this number was already superseded
        unlink_quietly(path)
        return None
    return path


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.json"


def _number(path: Path) -> int:
    return int(path.stem)


def _numbers(folder: Path) -> list[int]:
    return [int(name[:-5]) for name in os.listdir(folder) if name[:-5].isdigit() and name.endswith(".json")]


def _read(folder: Path, number: int) -> Owner | None:
    """The content of an owner file; None if it is not yet written, or was lost in a crash."""
    try:
        return Owner(**json.loads(_path(folder, number).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _renewed(folder: Path, number: int) -> float | None:
    """When an owner's file was last renewed, by the file system's clock; None if it is gone.

    Opening the file makes an NFS client ask the server instead of using its cache.
    """
    try:
        with _path(folder, number).open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _now(folder: Path) -> float:
    """The current time by the file system's clock."""
    probe = partial_file(folder)
    try:
        with open(probe, "xb") as file:
            file.write(b"x")
        touch(probe)
        return probe.stat().st_mtime
    finally:
        unlink_quietly(probe)


def _kernel() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _start_ticks(pid: int) -> int | None:
    """Start time of a process in clock ticks after boot; None if it has ended (even if not yet reaped)."""
    try:
        state, *fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])  # proc(5): field 22


def _end_this_process(why: str) -> None:
    """Exit at once: the folder now belongs to another run."""
    print(f"owt: {why}; this run ends", file=sys.stderr, flush=True)
    os._exit(1)
