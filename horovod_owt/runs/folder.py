"""The run folder: its configuration, its outcome, and where the stacks of its ranks go.

    RUN/  config.json  metrics.jsonl  outcome.json  attempts.jsonl  checkpoints/  stacks/

`records`, `attempts` and `checkpoints` know the others. Only rank 0 writes, but for its own stacks each rank.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from horovod_owt.config import TrainConfig
from horovod_owt.errors import ConfigError
from horovod_owt.files import write_text
from horovod_owt.runs.checkpoints import list_checkpoints

log = logging.getLogger(__name__)

CONFIG, OUTCOME, STACKS = "config.json", "outcome.json", "stacks"

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
    config_file = run_dir / CONFIG
    if config_file.exists():
        before = _read_object(
            config_file, what="the run's configuration", fix="remove it: the next run writes it again"
        )
        _check_continues(run_dir, before, cfg, resume=resume)
    write_text(config_file, json.dumps(cfg.to_dict(), indent=1) + "\n")
    return run_dir


def _read_object(file: Path, *, what: str, fix: str) -> dict[str, Any]:
    """What a file of JSON holds; FileNotFoundError if there is none, ConfigError where it is damaged."""
    try:
        found = json.loads(file.read_text())
        if isinstance(found, dict):
            return found
        fault = "holds no JSON object"
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        fault = f"is unreadable: {error}"
    raise ConfigError(f"{file} {fault}", wanted=what, fix=fix)


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


def write_outcome(run_dir: Path, outcome: dict[str, Any]) -> None:
    """How the run ended, on record: mpirun and horovodrun may return exit codes of their own."""
    try:
        write_text(run_dir / OUTCOME, json.dumps(outcome) + "\n")
    except OSError as error:
        log.warning("%s not written: %s", OUTCOME, error.strerror)


def read_outcome(run_dir: Path) -> dict[str, Any]:
    """How the run ended when it last did, with `exit_code` and `reason` at least.

    Raises FileNotFoundError where it has not yet, ConfigError where the file is damaged.
    """
    outcome = _read_object(run_dir / OUTCOME, what="how the run ended", fix="its ranks' logs tell that too")
    if not isinstance(outcome.get("exit_code"), int):
        raise ConfigError(f"{run_dir / OUTCOME} has no exit_code", wanted="how the run ended")
    return {"reason": "", **outcome}


def outcome_stamp(run_dir: Path) -> tuple[int, int] | None:
    """Differs for each outcome that is written, as each is a new file; None where there is none."""
    try:
        stat = (run_dir / OUTCOME).stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def stacks_folder(run_dir: Path) -> Path:
    """Where ranks that are stuck write what each of their threads does."""
    return run_dir / STACKS


def stacks_file(run_dir: Path, rank: int) -> Path:
    return stacks_folder(run_dir) / f"rank-{rank:04d}.txt"
