"""File operations that some file systems refuse, with a fallback for each.

    refused                                    for example on                      instead
    fsync of a folder                          SMB, FUSE                           left to the server
    renaming over a file that is open          SMB, 9p, FUSE                       wait, then swap in 2 steps
    renaming a folder                          overlayfs, mergerfs, object stores  move its files one by one
    renaming between two folders               project quotas, AFS, mergerfs       copy
    deleting the last trace of an open file    NFS (.nfsX), FUSE (.fuse_hiddenX)   wait until it is closed
    setting the modification time              NFS with root squashing, SMB        rewrite a byte
    changing permissions                       SMB, FAT                            left unchanged
    flock                                      NFS without lockd, Lustre           no lock
    statfs, or its numbers are 0               FUSE                                free space is unknown

Other errors, such as a full disk, are raised unchanged.
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

NO_LINK = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # NONBLOCK: do not wait for the other end of a FIFO
PARTIAL = ".*.partial"  # names of files and folders that a killed write leaves behind

UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
NO_SYNC = UNSUPPORTED | {errno.EBADF, errno.EROFS}
NO_FOLDER_SYNC = NO_SYNC | {errno.EACCES, errno.EPERM, errno.EISDIR}
IN_USE = {errno.EBUSY, errno.ETXTBSY, errno.EACCES, errno.EPERM, errno.EEXIST}
FOLDER_IN_USE = {errno.EBUSY, errno.ETXTBSY, errno.EACCES}
NO_FOLDER_RENAME = UNSUPPORTED | IN_USE | {errno.EXDEV, errno.ENOTEMPTY, errno.EMFILE}  # gcsfuse: EMFILE
LINGERS = {errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY}
RETRY_WAITS_S = (0.05, 0.2, 0.5)  # while another process reads the file, or is closing it


def partial_file(folder: Path) -> Path:
    """An unused hidden name in `folder`, matched by PARTIAL."""
    return folder / f".{os.getpid()}-{secrets.token_hex(4)}.partial"


def partial_folder(folder: Path) -> Path:
    """An unused hidden name beside `folder`, matched by PARTIAL."""
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")


def sync(path: Path) -> None:
    """fsync a file, or the entries of a folder, if the file system supports it."""
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
    """Rename a file, replacing an existing one.

    Atomic, unless the file system refuses to replace an open file: `target` is then missing for a moment.
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
    """Rename a folder; raises OSError if `target` exists and is not an empty folder.

    If the file system refuses, the files are moved one by one, the file named `last` at the end: `target` is
    complete once it has that. With `merge`, `target` may have some of the files, from a call that was killed.
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


def rename_to_hidden(folder: Path) -> Path:
    """Rename a folder to a name that PARTIAL matches; returns `folder` if the file system cannot do that."""
    hidden = partial_folder(folder)
    try:
        _repeated(lambda: os.replace(folder, hidden), FOLDER_IN_USE)
    except OSError as error:
        if error.errno not in UNSUPPORTED | {errno.EXDEV, errno.EMFILE}:
            raise
        return folder
    return hidden


def remove_tree(folder: Path) -> None:
    """Delete a folder, even while another process deletes parts of it, or briefly has files open.

    Raises OSError if something remains.
    """

    def remove() -> None:
        try:
            shutil.rmtree(folder)
        except OSError:
            if os.path.lexists(folder):
                raise

    _repeated(remove, LINGERS | {errno.ENOENT})


def unlink_quietly(path: Path) -> None:
    """Delete a file; errors are ignored."""
    with suppress(OSError):
        path.unlink()


def touch(path: Path) -> None:
    """Set a file's modification time to now, by the file server's clock; the file must not be empty."""
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
    """Lock a file during the block, exclusively unless `shared`; yields False if locks are not supported.

    The file is created if it is missing. Raises BlockingIOError if another process holds the lock, unless
    told to `wait`; FileNotFoundError if the file was deleted meanwhile; another OSError if it is a link.
    """
    with open(os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666), "r+b") as file:
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            raise
        except PermissionError:  # may be raised by POSIX locks, which NFS uses for flock
            raise BlockingIOError(errno.EAGAIN, "locked by another process", str(path)) from None
        except OSError:
            held = False
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        yield held


def remove_permissions(path: Path, bits: int) -> None:
    """Clear these permission bits of a path, if the file system supports permissions."""
    with suppress(OSError):
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~bits)


def free_space(folder: Path) -> tuple[int | None, int | None]:
    """Free bytes and free inodes; None where the file system does not report them."""
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
    """Total bytes of the file system; 0 if it does not report them."""
    try:
        disk = os.statvfs(folder)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return 0
    return disk.f_blocks * disk.f_frsize


def extend(descriptor: int, size: int) -> int:
    """Append `size` zero bytes to a file, with disk space allocated; returns their offset.

    If the disk is full, raises OSError and leaves the file unchanged.
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
    """Remove the folder on TERM too, which launchers send to their ranks at Ctrl-C.

    Has no effect if TERM has a handler already, or outside the main thread, where handlers cannot be set.
    """
    unhandled = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if not unhandled or threading.current_thread() is not threading.main_thread():
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
    """Call `action`, and again after each of RETRY_WAITS_S while it raises a `transient` error."""
    for wait_s in RETRY_WAITS_S:
        try:
            return action()
        except OSError as error:
            if error.errno not in transient:
                raise
        time.sleep(wait_s)
    return action()
