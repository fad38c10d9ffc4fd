"""Safe use of places where other users can write: a shared cache, a group's folder, /tmp."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

from horovod_owt.filesystem import NO_LINK, remove_permissions


def private_folder(path: Path) -> Path:
    """Create a folder that only this user can enter; PermissionError if it belongs to another user.

    If it exists and others can write to it, their write permission is removed.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if {path.lstat().st_uid, path.stat().st_uid} != {os.geteuid()}:
        raise PermissionError(errno.EPERM, "belongs to another user", str(path))
    if path.stat().st_mode & 0o022:
        remove_permissions(path, 0o022)
    return path


def open_trusted(path: Path, owners: Collection[int]) -> BinaryIO:
    """Open a file for reading; OSError if it is a link, or belongs to none of these users."""
    descriptor = os.open(path, os.O_RDONLY | NO_LINK)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_uid not in owners:
        os.close(descriptor)
        raise PermissionError(errno.EPERM, f"a file of user {found.st_uid}", str(path))
    return open(descriptor, "rb")
