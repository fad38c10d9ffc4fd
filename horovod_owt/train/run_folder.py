"""The run folder: its configuration, its metrics, its outcome. Only rank 0 writes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from horovod_owt.config import TrainConfig
from horovod_owt.errors import ConfigError
from horovod_owt.train.checkpoint import list_checkpoints, write_atomically

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
        _check_continues(run_dir, json.loads(config_file.read_text()), cfg, resume=resume)
    write_atomically(config_file, json.dumps(cfg.to_dict(), indent=1) + "\n")
    return run_dir


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
    """`metrics.jsonl`: one JSON object a line with its `kind`, on disk as soon as it is known."""

    def __init__(self, run_dir: Path) -> None:
        self._file = (run_dir / "metrics.jsonl").open("a", buffering=1)

    def write(self, kind: str, **values: Any) -> None:
        self._file.write(json.dumps({"kind": kind, **values}) + "\n")

    def close(self) -> None:
        self._file.close()


def write_outcome(run_dir: Path, outcome: dict[str, Any]) -> None:
    """How the run ended, on record: mpirun and horovodrun may return exit codes of their own."""
    write_atomically(run_dir / "outcome.json", json.dumps(outcome) + "\n")
