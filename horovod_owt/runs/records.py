"""The records of a run: metrics.jsonl, one JSON object per line with a `kind`.

Each line here, in attempts.jsonl and in outcome.json has a `time` (UTC), the number of the `attempt` in its
run folder, and the scheduler's `job_id` (null without one), by which records of several sources can be
joined.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

from horovod_owt.errors import ConfigError
from horovod_owt.logs import utc
from horovod_owt.text import json_text

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
STEP_KINDS = ("step", "validation", "checkpoint")  # records that name a step
MAX_STEPS = 1 << 62
BLOCK_BYTES = 1 << 16  # per read, from the end of the file


def time_of(record: Mapping[str, Any], key: str = "time") -> float | None:
    """A record's Unix time; None if it has none, as in older versions."""
    try:
        return datetime.fromisoformat(record[key].replace("Z", "+00:00")).timestamp()
    except (KeyError, ValueError, AttributeError):
        return None


@dataclass(frozen=True)
class Start:
    """The start of an attempt, as identified in its records."""

    attempt: int = 1  # of the run folder, counted from 1
    job_id: str | None = None  # the scheduler's

    def stamp(self) -> dict[str, Any]:
        """The keys common to all records of this attempt, with the current time."""
        return {"time": utc(), "attempt": self.attempt, "job_id": self.job_id}


FIRST = Start()


class MetricsLog:
    """Writes `metrics.jsonl`, one JSON object per line with a `kind`, unbuffered. Thread-safe.

    Lines that cannot be written now are kept in memory.
    """

    def __init__(self, run_dir: Path, start: Start = FIRST) -> None:
        """Raises ConfigError if the file cannot be opened."""
        self._start = start
        path = run_dir / METRICS
        try:
            drop_incomplete_line(path)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            fix = "make it writable, or use another --run-dir"
            raise ConfigError(f"{path}: {error.strerror}", wanted="a file to append to", fix=fix) from None
        self._unwritten = b""
        self._one_at_a_time = Lock()
        self._refused = False

    def write(self, kind: str, **values: Any) -> dict[str, Any]:
        """Write a line; returns its record."""
        with self._one_at_a_time:
            record = {"kind": kind, **self._start.stamp(), **values}
            self._unwritten += (json_text(record) + "\n").encode()
            try:
                while self._unwritten:
                    self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
                self._refused = False
            except OSError as error:
                if not self._refused:
                    log.warning(
                        "%s: %s; lines are kept in memory until it is writable", METRICS, error.strerror
                    )
                self._refused = True
        return record

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:  # late error of a network file system
            log.warning("%s: %s", METRICS, error.strerror)


def records_size(run_dir: Path) -> int:
    """Bytes of the complete lines of metrics.jsonl, to pass to `last_step` as `start`."""
    try:
        with (run_dir / METRICS).open("rb") as file:
            return _end_of_lines(file, file.seek(0, os.SEEK_END))
    except OSError:  # reported when the records are read
        return 0


def validations(run_dir: Path, steps: set[int]) -> dict[int, dict[str, Any]]:
    """The validation records after these `steps`, by step, as far as there are any.

    Records of steps that were discarded when the run resumed from an earlier step do not count.
    """
    found: dict[int, dict[str, Any]] = {}
    wanted = set(steps)
    for record in newest_records(run_dir / METRICS):
        if record.get("kind") == "validation" and record.get("step") in wanted:
            found[record["step"]] = record
            wanted.discard(record["step"])
        elif record.get("kind") == "run":
            wanted = {step for step in wanted if step <= record.get("first_step", step)}
        elif record.get("kind") == "step" and not lacks_step(record):
            # all older records of this attempt are of earlier steps, and it resumed before this one
            wanted = {step for step in wanted if step <= record["step"]}
        if not wanted:
            break
    return found


def checkpoint_recorded(run_dir: Path) -> int:
    """The step of the last checkpoint since the run began at initial weights, by its records; 0 if none."""
    for record in newest_records(run_dir / METRICS):
        if record.get("kind") == "checkpoint" and not lacks_step(record):
            return record["step"]
        if record.get("kind") == "run" and record.get("first_step") == 0:
            break
    return 0


def last_step(run_dir: Path, *, start: int = 0) -> tuple[int | None, float | None]:
    """The last step in metrics.jsonl after byte `start`, and its images per second."""
    for record in newest_records(run_dir / METRICS, start=start):
        if record.get("kind") == "step" and isinstance(record.get("step"), int):
            return record["step"], record.get("images_per_s")
    return None, None


def lacks_step(record: Mapping[str, Any]) -> bool:
    """Whether a step, validation or checkpoint record lacks a valid step number, so is damaged."""
    step = record.get("step")
    return record.get("kind") in STEP_KINDS and not (isinstance(step, int) and 0 <= step < MAX_STEPS)


def last_attempt(file: Path) -> int:
    """The newest attempt number in a file of records; 0 if there is none."""
    numbers = (record.get("attempt") for record in newest_records(file))
    return next((number for number in numbers if isinstance(number, int)), 0)


def records(file: Path, on_damage: Callable[[bytes], None] | None = None) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines, oldest first; otherwise like `newest_records`.

    `on_damage` is called with each damaged line, instead of the warning.
    """
    yield from _parsed_lines(file, _lines_forwards(file), on_damage)


def newest_records(file: Path, *, start: int = 0) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines, from its end back to byte `start`; none if there is no file.

    Damaged lines are skipped, with one warning. Zeros left by a power cut, and an incomplete last line that
    may still be being written, are skipped silently. Raises ConfigError if the file cannot be read.
    """
    yield from _parsed_lines(file, _lines_backwards(file, start))


def _parsed_lines(
    file: Path, lines: Iterator[bytes], on_damage: Callable[[bytes], None] | None = None
) -> Iterator[dict[str, Any]]:
    damaged = 0
    try:
        for line in lines:
            record = _parsed(line)
            if record is not None:
                yield record
            elif on_damage:
                on_damage(line)
            elif not damaged:
                damaged = 1
                log.warning("%s: damaged line skipped: %s", file, shown(line))
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        fix = "check its permissions and the file system"
        raise ConfigError(f"{file}: {error.strerror}", wanted="a file of records", fix=fix) from None


def append_record(file: Path, record: dict[str, Any]) -> None:
    """Append a line, after removing an incomplete one left by a crash; raises OSError."""
    drop_incomplete_line(file)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json_text(record) + "\n")


def drop_incomplete_line(path: Path) -> None:
    """Truncate an incomplete last line, which a killed writer may have left."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        whole = _end_of_lines(file, end)
        if whole != end:
            file.truncate(whole)


def _end_of_lines(file: BinaryIO, end: int) -> int:
    """The end of the last complete line."""
    while end:
        begin = max(0, end - BLOCK_BYTES)
        file.seek(begin)
        found = file.read(end - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def _lines_backwards(path: Path, start: int) -> Iterator[bytes]:
    """The complete, non-empty lines of a file from byte `start` on, last one first."""
    with path.open("rb") as file:
        end = _end_of_lines(file, file.seek(0, os.SEEK_END))
        rest = b""  # the end of a line whose start has not been read yet
        while end > start:
            begin = max(start, end - BLOCK_BYTES)
            file.seek(begin)
            rest, *lines = (file.read(end - begin) + rest).split(b"\n")
            yield from (line for line in reversed(lines) if line.strip(b"\0"))
            end = begin
        if rest.strip(b"\0"):
            yield rest


def _lines_forwards(path: Path) -> Iterator[bytes]:
    """The complete, non-empty lines of a file."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n") and line.strip(b"\0\n"):
                yield line[:-1]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def shown(line: bytes) -> str:
    """The beginning of a damaged line, for a message."""
    return repr(line[:40])[1:] + (f" and {len(line) - 40} bytes more" if len(line) > 40 else "")
