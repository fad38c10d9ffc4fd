"""One run at a time in a run folder: the process that owns it, and what becomes of the rights of a dead one.

    RUN/owner/00000003.json     the third owner; its file's time is renewed every few seconds

Each owner creates a file with the next number, which one process alone can do (O_EXCL, on NFS and Lustre too,
where flock may be missing or hold for one host only). The highest number owns the folder. An owner that
leaves says so in its file, which the next one removes: numbers never begin anew, so nobody can take away a
lock that another has just taken over, as those might who remove a stale lock to make their own.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread
from types import TracebackType

from horovod_owt.errors import ConfigError
from horovod_owt.files import atomic_file

log = logging.getLogger(__name__)

OWNER = "owner"
RENEW_S = 5.0  # between two renewals of an owner's file
WATCH_S = 10.0  # whoever finds an owner looks at it for so long: it may be about to leave, or be alive
STALE_S = 30.0  # an owner elsewhere that has not renewed its file for so long is gone
POLL_S = 0.25


@dataclass(frozen=True)
class Owner:
    """A process, in terms that hold on other hosts: what its file says."""

    host: str
    kernel: str  # boot and process namespace: where it is the same, process numbers mean the same
    pid: int
    start_ticks: int  # of the process, after boot: process numbers come again
    started: str  # the same for people, in this host's time
    driver: str = ""  # of an elastic job, which has one owner after another
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
    """The address of the process that starts an elastic job's ranks, the same for all of them; else empty."""
    if env.get("HOROVOD_ELASTIC") != "1":
        return ""
    return f"{env.get('HOROVOD_GLOO_RENDEZVOUS_ADDR')}:{env.get('HOROVOD_GLOO_RENDEZVOUS_PORT')}"


class Ownership:
    """This process's right to write to a run folder, from `take` to the end of the `with` block.

    `on_loss` is called, in a thread, when another process has taken the folder over: it held this one for
    dead, as its host or its way to the file system stood still for more than STALE_S.
    """

    def __init__(self, on_loss: Callable[[str], None] | None = None) -> None:
        self._on_loss = on_loss or _end_this_process
        self._file: Path | None = None
        self._enough = Event()
        self._renewing: Thread | None = None

    def __enter__(self) -> Ownership:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    def take(self, run_dir: Path) -> None:
        """Own the folder; waits up to STALE_S to find out whether an owner on another host is alive.

        Raises ConfigError with host, process and time where it is, OSError where the file system refuses.
        """
        if self._file is not None:
            return
        folder = run_dir / OWNER
        folder.mkdir(exist_ok=True)
        me = this_process(os.environ)
        while self._file is None:
            number = _wait_for_turn(run_dir, me)
            self._file = _create(folder, number + 1, me)
        for older in _numbers(folder):
            if older < _number(self._file):
                _path(folder, older).unlink(missing_ok=True)
        self._enough.clear()
        self._renewing = Thread(target=self._renew, args=(run_dir, self._file), name="owner", daemon=True)
        self._renewing.start()

    def hand_over(self) -> None:
        """To the process that is rank 0 of this elastic job now; the folder has an owner all the while."""
        if self._file is not None:
            self._file = None
            self._enough.set()
            self._renewing.join()

    def leave(self) -> None:
        """Let the next one have the folder; does nothing where this process does not own it."""
        file = self._file
        if file is None:
            return
        self.hand_over()
        try:
            left = {**json.loads(file.read_text()), "left": True}
            with atomic_file(file) as scratch:
                scratch.write(json.dumps(left).encode())
        except (OSError, ValueError) as error:  # a disk that refuses; the next one sees that we are gone
            log.warning("%s not marked as left: %s", file, error)

    def _renew(self, run_dir: Path, file: Path) -> None:
        folder = file.parent
        while not self._enough.wait(RENEW_S):
            try:
                last = max(_numbers(folder), default=0)
                if last > _number(file):
                    self._on_loss(f"run folder {run_dir} was taken over by {_read(folder, last)}")
                    return
                os.utime(file)  # the file server's time, where there is one
            except OSError:  # a mount that is gone may come back; what can't be written is told elsewhere
                continue


def _wait_for_turn(run_dir: Path, me: Owner) -> int:
    """The last owner's number when it is gone, 0 if there was none; ConfigError for one that is alive."""
    folder = run_dir / OWNER
    watched, since, at_first = 0, 0.0, 0.0  # the owner's number, since when, and its last renewal before that
    while True:
        number = max(_numbers(folder), default=0)
        owner, renewed = _read(folder, number), _renewed(folder, number)
        if not number or (owner and owner.left):
            return number
        if owner and (why := _why_over(owner, me)):
            log.warning("run folder %s taken over from %s: %s", run_dir, owner, why)
            return number
        if number != watched:
            watched, since, at_first = number, time.monotonic(), renewed
        elif renewed is not None and time.monotonic() > since + WATCH_S:  # None: the next owner removed it
            if renewed != at_first or (owner and owner.kernel == me.kernel):
                raise ConfigError(
                    f"run folder {run_dir} is in use by {owner}",
                    wanted="one run at a time in a folder",
                    fix="wait for its end or stop it, or another --run-dir",
                )
            silent_s = _now(folder) - renewed
            if silent_s >= STALE_S:
                who = owner or "a process that left no name"
                log.warning("run folder %s taken over from %s: silent for %d s", run_dir, who, silent_s)
                return number
        time.sleep(POLL_S)


def _why_over(owner: Owner, me: Owner) -> str:
    """How it is known that an owner no longer is one; empty if it is not."""
    if owner.kernel == me.kernel and _start_ticks(owner.pid) != owner.start_ticks:
        return "it has ended"
    return "another rank of this job is rank 0 now" if me.driver and owner.driver == me.driver else ""


def _create(folder: Path, number: int, owner: Owner) -> Path | None:
    """This owner's file; None where another process was first."""
    path = _path(folder, number)
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return None
    try:
        with open(descriptor, "w") as file:
            file.write(json.dumps(asdict(owner)) + "\n")
    except OSError:  # a full disk: others should not wait for an owner without a name
        path.unlink(missing_ok=True)
        raise
    if max(_numbers(folder)) > number:  # this one was long over when it was created
        path.unlink(missing_ok=True)
        return None
    return path


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.json"


def _number(path: Path) -> int:
    return int(path.stem)


def _numbers(folder: Path) -> list[int]:
    return [int(name[:-5]) for name in os.listdir(folder) if name[:-5].isdigit() and name.endswith(".json")]


def _read(folder: Path, number: int) -> Owner | None:
    """What an owner says of itself; None where it has not yet, or a crash kept it from doing so."""
    try:
        return Owner(**json.loads(_path(folder, number).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _renewed(folder: Path, number: int) -> float | None:
    """When an owner's file was renewed last, by the file system's clock; None where it is gone.

    The file is opened for it: an NFS client then asks the server, and does not answer from its cache.
    """
    try:
        with _path(folder, number).open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _now(folder: Path) -> float:
    """The file system's clock."""
    probe = folder / f".{socket.gethostname()}-{os.getpid()}.clock"
    try:
        probe.write_bytes(b"")
        os.utime(probe)
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _kernel() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks after boot; None for one that has ended, reaped or not."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])  # proc(5): the 22nd of all


def _end_this_process(why: str) -> None:
    """At once: what it would write now is another run's."""
    print(f"owt: {why}; this run ends", file=sys.stderr, flush=True)
    os._exit(1)
