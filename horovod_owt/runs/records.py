"""The records of a run: metrics.jsonl, one JSON object a line with its `kind`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

from horovod_owt.errors import ConfigError

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
BLOCK_BYTES = 1 << 16  # read at a time, from a file's end


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line with its `kind`, handed to the system as soon as it is known.

    While the disk refuses lines they are kept, and written when it takes them again.
    """

    def __init__(self, run_dir: Path) -> None:
        """Raises ConfigError where the file can't be opened."""
        path = run_dir / METRICS
        try:
            drop_half_a_line(path)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            fix = "rights to write there, or another --run-dir"
            raise ConfigError(f"{path}: {error.strerror}", wanted="a file to append to", fix=fix) from None
        self._unwritten = b""
        self._one_at_a_time = Lock()
        self._refused = False

    def write(self, kind: str, **values: Any) -> None:
        with self._one_at_a_time:
            self._unwritten += (json.dumps({"kind": kind, **values}) + "\n").encode()
            try:
                while self._unwritten:
                    self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
                self._refused = False
            except OSError as error:
                if not self._refused:
                    log.warning("%s: %s; its lines are kept until it takes them", METRICS, error.strerror)
                self._refused = True

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:  # what a network file system says last
            log.warning("%s: %s", METRICS, error.strerror)


def records_size(run_dir: Path) -> int:
    """Bytes of the whole lines of metrics.jsonl, 0 if there are none: `last_step` can look back to there."""
    try:
        with (run_dir / METRICS).open("rb") as file:
            return _end_of_lines(file, file.seek(0, os.SEEK_END))
    except OSError:  # who asks for the records later is told
        return 0


def validations(run_dir: Path, steps: set[int]) -> dict[int, dict[str, Any]]:
    """The validations of the states after `steps`, by step; those that the run has not are left out.

    A run that resumed from an earlier step has taken back what was written of later ones before it did.
    """
    found: dict[int, dict[str, Any]] = {}
    wanted = set(steps)
    for record in newest_records(run_dir / METRICS):
        if record.get("kind") == "validation" and record.get("step") in wanted:
            found[record["step"]] = record
            wanted.discard(record["step"])
        elif record.get("kind") == "run":
            wanted = {step for step in wanted if step <= record.get("first_step", step)}
        if not wanted:
            break
    return found


def last_step(run_dir: Path, *, start: int = 0) -> tuple[int | None, float | None]:
    """The last step that metrics.jsonl has behind byte `start`, and its images per second."""
    for record in newest_records(run_dir / METRICS, start=start):
        if record.get("kind") == "step" and isinstance(record.get("step"), int):
            return record["step"], record.get("images_per_s")
    return None, None


def newest_records(file: Path, *, start: int = 0) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines, from its end back to byte `start`; none where there is no file.

    A damaged line is named in the log and passed over. So are, without a word, the zeros of a power cut and
    half a line at the end, which may be one that is being written. Raises ConfigError where the file cannot
    be read.
    """
    damaged = 0
    try:
        for line in _lines_backwards(file, start):
            record = _parsed(line)
            if record is not None:
                yield record
            elif not damaged:
                damaged = 1
                log.warning("%s: damaged line passed over: %s", file, _shown(line))
    except FileNotFoundError:
        return
    except OSError as error:
        fix = "rights to read it, or a file system that is up"
        raise ConfigError(f"{file}: {error.strerror}", wanted="a file of records", fix=fix) from None


def append_record(file: Path, record: dict[str, Any]) -> None:
    """Add a line, behind whatever a crash left of the last one; raises OSError."""
    drop_half_a_line(file)
    with file.open("a") as lines:
        lines.write(json.dumps(record) + "\n")


def drop_half_a_line(path: Path) -> None:
    """Cut off what is behind the last line's end: a writer that was killed may have left it."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        whole = _end_of_lines(file, end)
        if whole != end:
            file.truncate(whole)


def _end_of_lines(file: BinaryIO, end: int) -> int:
    """Where the last whole line ends."""
    while end:
        begin = max(0, end - BLOCK_BYTES)
        file.seek(begin)
        found = file.read(end - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def _lines_backwards(path: Path, start: int) -> Iterator[bytes]:
    """The whole lines of a file from byte `start` on that hold something, the last one first."""
    with path.open("rb") as file:
        end = _end_of_lines(file, file.seek(0, os.SEEK_END))
        rest = b""  # of a line whose beginning is not yet read
        while end > start:
            begin = max(start, end - BLOCK_BYTES)
            file.seek(begin)
            rest, *lines = (file.read(end - begin) + rest).split(b"\n")
            yield from (line for line in reversed(lines) if line.strip(b"\0"))
            end = begin
        if rest.strip(b"\0"):
            yield rest


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _shown(line: bytes) -> str:
    return repr(line[:40])[1:] + (f" and {len(line) - 40} bytes more" if len(line) > 40 else "")
