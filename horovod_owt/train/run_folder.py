"""The run folder: its configuration, its metrics, its outcome. Only rank 0 writes."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from threading import Lock
from typing import Any

from horovod_owt.config import TrainConfig
from horovod_owt.errors import ConfigError
from horovod_owt.files import write_text
from horovod_owt.train.checkpoint import list_checkpoints

log = logging.getLogger(__name__)

# A resumed run must keep what gives the weights their shape and the samples their order.
FIXED_KEYS = ("model", "classes", "image_size", "seed")


def open_run_folder(run_dir: Path | None, cfg: TrainConfig, *, resume: bool) -> Path:
    """Make the run folder, or find it fit to be continued; `None` names a new one after model and time.

    Raises ConfigError when it holds a run that is not to be continued, or cannot be with `cfg`.
    """
    run_dir = (run_dir or Path("runs") / f"{cfg.model}-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / ".writable").touch()
        (run_dir / ".writable").unlink()
    except OSError as error:
        raise ConfigError(
            f"run folder {run_dir}: {error.strerror}",
            wanted="a folder to write to",
            fix="--run-dir ELSEWHERE",
        ) from None
    config_file = run_dir / "config.json"
    if config_file.exists():
        _check_continues(run_dir, _read_config(config_file), cfg, resume=resume)
    write_text(config_file, json.dumps(cfg.to_dict(), indent=1) + "\n")
    return run_dir


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
        if isinstance(config, dict):
            return config
        what = "holds no configuration"
    except (OSError, ValueError) as error:
        what = f"is unreadable: {error}"
    fix = "remove it: the next run writes it again"
    raise ConfigError(f"{file} {what}", wanted="the run's configuration", fix=fix)


def _check_continues(run_dir: Path, before: dict[str, Any], cfg: TrainConfig, *, resume: bool) -> None:
    if not list_checkpoints(run_dir):
        return  # it never came to a checkpoint: start afresh
    if not resume:
        raise ConfigError(
            f"run folder {run_dir} holds a run with checkpoints",
            wanted="a new folder, as --resume never asks",
            fix="--resume auto to continue it, or another --run-dir",
        )
    now = cfg.to_dict()
    for key in FIXED_KEYS:
        if key in before and before[key] != now[key]:
            raise ConfigError(
                f"run folder {run_dir} was trained with {key}={before[key]}, now {key}={now[key]}",
                wanted="the same to continue it",
                fix=f"--set {key}={before[key]}, or another --run-dir",
            )


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line with its `kind`, handed to the system as soon as it is known.

    While the disk refuses lines they are kept, and written when it takes them again.
    """

    def __init__(self, run_dir: Path) -> None:
        """Raises ConfigError where the file can't be opened."""
        path = run_dir / "metrics.jsonl"
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
                    log.warning("metrics.jsonl: %s; its lines are kept until it takes them", error.strerror)
                self._refused = True

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:  # what a network file system says last
            log.warning("metrics.jsonl: %s", error.strerror)


def validated_steps(run_dir: Path) -> set[int]:
    """The steps after which metrics.jsonl has a validation."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return set()
    found = (
        json.loads(line) for line in lines if line.startswith('{"kind": "validation"') and line.endswith("}")
    )
    return {record["step"] for record in found}


def write_outcome(run_dir: Path, outcome: dict[str, Any]) -> None:
    """How the run ended, on record: mpirun and horovodrun may return exit codes of their own."""
    try:
        write_text(run_dir / "outcome.json", json.dumps(outcome) + "\n")
    except OSError as error:
        log.warning("outcome.json not written: %s", error.strerror)


def _drop_half_a_line(path: Path) -> None:
    """A run that was killed while its disk was full may have left one."""
    if path.exists():
        text = path.read_bytes()
        if not text.endswith(b"\n"):
            os.truncate(path, text.rfind(b"\n") + 1)
