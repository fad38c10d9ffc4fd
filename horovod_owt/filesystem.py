"""File operations that some file systems refuse, and what is done there instead.

    refused                                    for example on                      instead
    fsync of a folder                          SMB, FUSE                           left to the server
    renaming over a file that is open          SMB, 9p, FUSE                       wait, then swap in 2 steps
    renaming a folder                          overlayfs, mergerfs, object stores  move its files one by one
    renaming between two folders               project quotas, AFS, mergerfs       copy
    deleting the last trace of an open file    NFS (.nfsX), FUSE (.fuse_hiddenX)   wait until it is closed
    setting the modification time              NFS with root squashing, SMB        rewrite a byte
    changing rights                            SMB, FAT                            they stay
    flock                                      NFS without lockd, Lustre           no lock
    statfs, or its numbers are 0               FUSE                                free space is unknown

Errors of another kind, such as a full disk, are raised unchanged.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from horovod_owt.errors import ConfigError

NO_LINK = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # nor wait for the other end of a FIFO
PARTIAL = ".*.partial"  # what a killed write leaves behind

UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
NO_SYNC = UNSUPPORTED | {errno.EBADF, errno.EROFS}
NO_FOLDER_SYNC = NO_SYNC | {errno.EACCES, errno.EPERM, errno.EISDIR}
IN_USE = {errno.EBUSY, errno.ETXTBSY, errno.EACCES, errno.EPERM, errno.EEXIST}
FOLDER_IN_USE = {errno.EBUSY, errno.ETXTBSY, errno.EACCES}
NO_FOLDER_RENAME = UNSUPPORTED | IN_USE | {errno.EXDEV, errno.ENOTEMPTY, errno.EMFILE}  # gcsfuse: EMFILE
LINGERS = {errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY}
WAITS_S = (0.05, 0.2, 0.5)  # between attempts: another process reads the file, or is closing it


def partial_file(folder: Path) -> Path:
    """A new hidden name in `folder`, which PARTIAL matches."""
    return folder / f".{os.getpid()}-{secrets.token_hex(4)}.partial"


def partial_folder(folder: Path) -> Path:
    """A new hidden name beside `folder`, which PARTIAL matches."""
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")


def sync(path: Path) -> None:
    """fsync a file, or the entries of a folder, where the file system can."""
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        if is_folder and error.errno in NO_FOLDER_SYNC:
            return
        raise
    try:
        sync_descriptor(descriptor, NO_FOLDER_SYNC if is_folder else NO_SYNC)
    finally:
        os.close(descriptor)


def sync_descriptor(descriptor: int, refusals: set[int] = NO_SYNC) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in refusals:
            raise


def rename_file(source: Path, target: Path) -> None:
    """Rename a file, over an existing one too.

    Atomic, unless the file system refuses to replace an open file: then `target` is missing for a moment.
    """
    try:
        _repeated(lambda: os.replace(source, target), IN_USE)
    except OSError as error:
        if error.errno == errno.EXDEV:
            _copy_over(source, target)
        elif error.errno in IN_USE and target.is_file():
            _replace_in_two_steps(source, target)
        else:
            raise


def _copy_over(source: Path, target: Path) -> None:
    beside = partial_file(target.parent)
    try:
        shutil.copyfile(source, beside)
        sync(beside)
        rename_file(beside, target)
    except BaseException:
        unlink_quietly(beside)
        raise
    unlink_quietly(source)


def _replace_in_two_steps(source: Path, target: Path) -> None:
    aside = partial_file(target.parent)
    os.rename(target, aside)
    try:
        os.rename(source, target)
    except BaseException:
        os.rename(aside, target)
        raise
    unlink_quietly(aside)


def rename_folder(source: Path, target: Path, *, last: str = "", merge: bool = False) -> None:
    """Rename a folder; `target` may be an empty one, otherwise it raises OSError.

    Where that is refused, its files are moved one by one, the file named `last` at the end: only with it is
    `target` complete. With `merge`, `target` may have some of them, from a call that was killed.
    """
    if merge and target.exists():
        return _move_files(source, target, last)
    try:
        _repeated(lambda: os.replace(source, target), FOLDER_IN_USE)
    except OSError as error:
        if error.errno not in NO_FOLDER_RENAME or (target.exists() and any(os.scandir(target))):
            raise
        _move_files(source, target, last)


def _move_files(source: Path, target: Path, last: str) -> None:
    target.mkdir(exist_ok=True)
    for entry in sorted(source.iterdir(), key=lambda entry: (entry.name == last, entry.name)):
        if entry.is_dir() and not entry.is_symlink():
            _move_files(entry, target / entry.name, last)
        else:
            rename_file(entry, target / entry.name)
    sync(target)
    shutil.rmtree(source, ignore_errors=True)


def hide_folder(folder: Path) -> Path:
    """Rename a folder so that PARTIAL matches; returns `folder` where the file system renames no folders."""
    hidden = partial_folder(folder)
    try:
        _repeated(lambda: os.replace(folder, hidden), FOLDER_IN_USE)
    except OSError as error:
        if error.errno not in UNSUPPORTED | {errno.EXDEV, errno.EMFILE}:
            raise
        return folder
    return hidden


def remove_tree(folder: Path) -> None:
    """Delete a folder, of which another process may delete parts, or have files open for a moment.

    Raises OSError if something stays.
    """

    def remove() -> None:
        try:
            shutil.rmtree(folder)
        except OSError:
            if os.path.lexists(folder):
                raise

    _repeated(remove, LINGERS | {errno.ENOENT})


def unlink_quietly(path: Path) -> None:
    """Delete a file that does no harm if it stays."""
    with suppress(OSError):
        path.unlink()


def renew(path: Path) -> None:
    """Set a file's modification time to now, by the clock of its file server; it must not be empty."""
    try:
        os.utime(path)
    except FileNotFoundError:
        raise
    except OSError:
        with open(path, "r+b") as file:
            first = file.read(1)
            file.seek(0)
            file.write(first)


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[bool]:
    """Hold a lock on a file, an exclusive one unless `shared`; False where the file system has no locks.

    It is created if it is missing, and never emptied. Raises BlockingIOError if another process holds it,
    unless it is to `wait`; FileNotFoundError if it was deleted meanwhile; another OSError if it is a link.
    """
    with open(os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666), "r+b") as file:
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            raise
        except PermissionError:  # what POSIX locks, which NFS has in place of flock, may say
            raise BlockingIOError(errno.EAGAIN, "locked by another process", str(path)) from None
        except OSError:
            held = False
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        yield held


def take_rights(path: Path, rights: int) -> None:
    """Take these rights (of others, say) from a path, where the file system has rights."""
    with suppress(OSError):
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~rights)


def free_space(folder: Path) -> tuple[int | None, int | None]:
    """Free bytes and number of further files; None where the file system does not say."""
    try:
        disk = os.statvfs(folder)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return None, None
    return (
        disk.f_bavail * disk.f_frsize if disk.f_blocks else None,
        disk.f_favail if disk.f_files else None,
    )


def size_of_disk(folder: Path) -> int:
    """Bytes, free or not; 0 where the file system does not say."""
    try:
        disk = os.statvfs(folder)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return 0
    return disk.f_blocks * disk.f_frsize


def extend(descriptor: int, size: int) -> int:
    """Append `size` bytes of zeros to a file, with disk space for them; returns where they begin.

    Raises OSError, and leaves the file as it was, where the disk is full.
    """
    end = os.fstat(descriptor).st_size
    try:
        os.posix_fallocate(descriptor, end, size)
    except OSError:
        os.ftruncate(descriptor, end)
        raise
    return end


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A folder below TMPDIR, /tmp or /var/tmp, deleted afterwards; raises ConfigError if none is writable."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=prefix))
    except OSError as error:
        raise ConfigError(
            f"no temporary folder: {error.strerror}",
            wanted="a folder to write to: TMPDIR, /tmp or /var/tmp",
            fix="export TMPDIR=/path/of/a/writable/folder",
        ) from None
    try:
        with _removed_on_term(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _removed_on_term(folder: Path) -> Iterator[None]:
    """TERM, which launchers send to their ranks at Ctrl-C, removes the folder before it ends the process.

    Not where TERM has a handler already, nor outside of the main thread, which alone may set one.
    """
    free = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if not free or threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def end(number: int, _: object) -> None:
        if os.getpid() == owner:  # not in a forked worker
            shutil.rmtree(folder, ignore_errors=True)
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _repeated(action: Callable[[], None], transient: set[int]) -> None:
    """Call it again after each of WAITS_S while it raises one of these errors."""
    for wait_s in WAITS_S:
        try:
            return action()
        except OSError as error:
            if error.errno not in transient:
                raise
        time.sleep(wait_s)
    return action()
