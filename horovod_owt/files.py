"""Atomic writes of files and folders: written under a temporary name, then renamed."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".*.partial"  # what a killed write leaves behind


@contextmanager
def atomic_file(path: Path, *, durable: bool = False, folder: Path | None = None) -> Iterator[BinaryIO]:
    """A temporary file, in `folder` or next to `path`, that is renamed to `path` if the block succeeds.

    `durable` syncs file and folder, so that after a power cut `path` is the complete file or the old one.
    """
    scratch = (folder or path.parent) / f".{os.getpid()}-{secrets.token_hex(4)}.partial"
    try:
        with open(scratch, "xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a file's text atomically and durably: a reader sees the old text or the new one."""
    with atomic_file(path, durable=True) as file:
        file.write(text.encode())


@contextmanager
def atomic_folder(final: Path, *, durable: bool = False, replace: bool = False) -> Iterator[Path]:
    """A temporary folder next to `final`: renamed to it if the block succeeds, removed if it fails.

    `durable` syncs everything, as above. `replace` deletes an existing `final`; without it, OSError if
    `final` is anything but an empty folder.
    """
    scratch = final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")
    scratch.mkdir()
    try:
        yield scratch
        if durable:
            for path in [*scratch.rglob("*"), scratch]:
                sync(path)
        old = _hide(final) if replace and final.exists() else None
        os.replace(scratch, final)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    if durable:
        sync(final.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)  # already renamed, so leftovers do no harm


def remove_folder(folder: Path) -> None:
    """Remove a folder atomically: it is renamed first.

    Raises OSError where it can't be removed, or not all of it; then the rest has a name that PARTIAL matches.
    """
    shutil.rmtree(_hide(folder))


def _hide(folder: Path) -> Path:
    hidden = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    os.replace(folder, hidden)
    return hidden


def sync(path: Path) -> None:
    """fsync a file, or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
