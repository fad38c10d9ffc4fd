"""The records of a run: metrics.jsonl, one JSON object a line with its `kind`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any

from horovod_owt.errors import ConfigError

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
TAIL_BYTES = 1 << 16  # of a file: far more than one step's record


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line with its `kind`, handed to the system as soon as it is known.

    While the disk refuses lines they are kept, and written when it takes them again.
    """

    def __init__(self, run_dir: Path) -> None:
        """Raises ConfigError where the file can't be opened."""
        path = run_dir / METRICS
        try:
            _drop_half_a_line(path)
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
    """Bytes of metrics.jsonl, 0 where there is none: what `read_records` may start from later."""
    file = run_dir / METRICS
    return file.stat().st_size if file.exists() else 0


def read_records(run_dir: Path, kind: str, *, start: int = 0) -> Iterator[dict[str, Any]]:
    """The records of that kind from byte `start` on; none where the file cannot be read. No half lines."""
    beginning = f'{{"kind": "{kind}"'.encode()
    try:
        with (run_dir / METRICS).open("rb") as file:
            file.seek(start)
            for line in file:
                if line.startswith(beginning) and line.endswith(b"}\n"):
                    yield json.loads(line)
    except OSError:
        return


def validated_steps(run_dir: Path) -> set[int]:
    """The steps after which metrics.jsonl has a validation."""
    return {record["step"] for record in read_records(run_dir, "validation")}


def last_step(run_dir: Path) -> tuple[int | None, float | None]:
    """The newest step in metrics.jsonl, and its images per second."""
    steps = [record for record in last_records(run_dir / METRICS) if record["kind"] == "step"]
    return (steps[-1]["step"], steps[-1].get("images_per_s")) if steps else (None, None)


def last_records(file: Path) -> list[dict[str, Any]]:
    """Those at the end of a file of JSON lines, without a line that is only half there."""
    try:
        with file.open("rb") as lines:
            size = lines.seek(0, 2)
            lines.seek(max(0, size - TAIL_BYTES))
            tail = lines.read()
    except FileNotFoundError:
        return []
    whole = tail.split(b"\n")[1 if size > TAIL_BYTES else 0 : -1]
    return [json.loads(line) for line in whole]


def _drop_half_a_line(path: Path) -> None:
    """A run that was killed while its disk was full may have left one."""
    if path.exists():
        text = path.read_bytes()
        if not text.endswith(b"\n"):
            os.truncate(path, text.rfind(b"\n") + 1)
