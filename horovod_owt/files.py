"""Atomic writes of files and folders (under a temporary name, then renamed), and files named by users.

Operations that some file systems refuse are in `filesystem`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from horovod_owt.errors import ConfigError
from horovod_owt.filesystem import (
    partial_file,
    partial_folder,
    remove_tree,
    rename_file,
    rename_folder,
    rename_to_hidden,
    sync,
    sync_descriptor,
    unlink_quietly,
)
from horovod_owt.text import encode

# horovodrun's prefix of a rank's lines: [0]<stdout>:, under MPI [1,0]<stdout>: or [NAME@1,0]<stdout>:
TAG = re.compile(r"^[^\[{\n]*\[[^\]\n]*\]<stdout>: ?", re.MULTILINE)


@contextmanager
def atomic_file(path: Path, *, durable: bool = False, folder: Path | None = None) -> Iterator[BinaryIO]:
    """A temporary file, in `folder` or next to `path`, that is renamed to `path` if the block succeeds.

    `durable` syncs file and folder, so that after a power cut `path` is the complete file or the old one.
    """
    scratch = partial_file(folder or path.parent)
    try:
        with open(scratch, "xb") as file:
            yield file
            if durable:
                file.flush()
                sync_descriptor(file.fileno())
        rename_file(scratch, path)
    except BaseException:
        unlink_quietly(scratch)
        raise
    if durable:
        sync(path.parent)


@contextmanager
def users_file(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """`atomic_file` for a path that the user gave. Follows links, and writes to devices and pipes directly.

    Renaming a file to a device as root would replace /dev/null for everybody.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        with open(path, "wb") as file:
            yield file
        return
    with atomic_file(real_path(path), durable=durable) as file:
        yield file


@contextmanager
def output_file(path: Path, option: str) -> Iterator[BinaryIO]:
    """`users_file` for an output file that the user named with `option`; raises ConfigError."""
    try:
        with users_file(path) as file:
            yield file
    except OSError as error:
        saw = f"{option} {path}: {error.strerror or error}"
        raise ConfigError(saw, wanted="a file that can be written", fix=f"another {option}") from None


def users_path(text: Path | str) -> Path:
    """A path as users write it: no shell expands the ~ of `--run-dir=~/x`, nor one in quotes."""
    return Path(os.path.expanduser(text))


def real_path(path: Path | str) -> Path:
    """The absolute path without symbolic links; unlike `Path.resolve` it never raises for loops of links."""
    return Path(os.path.realpath(path))


def read_user_text(path: Path, *, wanted: str) -> str:
    """The text of a file that a user wrote, with or without a byte order mark; raises ConfigError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", wanted=wanted) from None
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        saw = f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        raise ConfigError(saw, wanted=wanted, fix=f"iconv -f latin1 -t utf-8 {path}, if it is text") from None
    if "\0" in text:
        raise ConfigError(f"{path} is a binary file", wanted=wanted)
    return text


def read_user_json(path: Path, *, wanted: str) -> Any:
    """The value in a JSON file, which may have horovodrun's prefixes; raises ConfigError."""
    text = read_user_text(path, wanted=wanted)
    for untagged in (text, TAG.sub("", text)):
        try:
            return json.loads(untagged)
        except (ValueError, RecursionError):
            continue
    raise ConfigError(f"{path} is not JSON", wanted=wanted)


def write_text(path: Path, text: str) -> None:
    """Replace a file's text atomically and durably: a reader sees the old text or the new one."""
    with atomic_file(path, durable=True) as file:
        file.write(encode(text))


@contextmanager
def atomic_folder(
    final: Path, *, durable: bool = False, replace: bool = False, last: str = ""
) -> Iterator[Path]:
    """A temporary folder next to `final`: renamed to it if the block succeeds, removed if it fails.

    `durable` syncs everything, as in `atomic_file`. `replace` deletes an existing `final`; without it,
    OSError if `final` is anything but an empty folder. On file systems that cannot rename folders, `final` is
    complete once it has the file named `last`.
    """
    scratch = partial_folder(final)
    scratch.mkdir()
    try:
        yield scratch
        if durable:
            for path in [*scratch.rglob("*"), scratch]:
                sync(path)
        old = _publish(scratch, final, replace=replace, last=last)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    if durable:
        sync(final.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)  # renamed before, so leftovers do no harm


def _publish(scratch: Path, final: Path, *, replace: bool, last: str) -> Path | None:
    """Rename `scratch` to `final`; returns the new name of the replaced folder, to be deleted."""
    old = rename_to_hidden(final) if replace and final.exists() else None
    if old == final:
        remove_tree(final)
    was_free = not final.exists()
    try:
        rename_folder(scratch, final, last=last)
    except BaseException:
        if was_free:
            shutil.rmtree(final, ignore_errors=True)  # files that were moved one by one
        if old not in (None, final):
            rename_folder(old, final)
        raise
    return None if old == final else old


def remove_folder(folder: Path) -> None:
    """Remove a folder atomically: it is renamed first, where that is possible.

    Raises OSError if not all of it can be removed; the rest then has a name that PARTIAL matches.
    """
    remove_tree(rename_to_hidden(folder))
