"""Files of a run folder: configuration, outcome, and stack dumps of the ranks.

    RUN/  config.json  metrics.jsonl  outcome.json  attempts.jsonl  checkpoints/  owner/  stacks/  logs/
          tensorboard/  profile/  timeline/

The others belong to `records`, `attempts`, `checkpoints` and `owner`. Only rank 0 writes, except that each
rank writes its own stacks, log and profile.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from pathlib import Path
from typing import Any, BinaryIO

from horovod_owt.errors import ConfigError, as_owt_error
from horovod_owt.files import write_text
from horovod_owt.filesystem import unlink_quietly

log = logging.getLogger(__name__)

CONFIG, OUTCOME, STACKS, LOGS = "config.json", "outcome.json", "stacks", "logs"
TENSORBOARD, PROFILE, TIMELINE = "tensorboard", "profile", "timeline"
KEPT_LOGS = 10  # attempts


def _read_object(file: Path, *, what: str, fix: str) -> dict[str, Any]:
    """The object in a JSON file; FileNotFoundError if it is missing, ConfigError if it is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        fault = "holds no JSON object"
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        if system_error := as_owt_error(error):  # the file may be intact
            raise system_error from error
        fault = f"is unreadable: {error}"
    raise ConfigError(f"{file} {fault}", wanted=what, fix=fix)


def write_config(run_dir: Path, config: dict[str, Any]) -> None:
    write_text(run_dir / CONFIG, json.dumps(config, indent=1) + "\n")


def read_config(run_dir: Path) -> dict[str, Any]:
    """The configuration of the run's last start, empty if there is none; ConfigError if it is damaged."""
    try:
        return _read_object(
            run_dir / CONFIG, what="the run's configuration", fix="remove it: the next run writes it again"
        )
    except FileNotFoundError:
        return {}


def write_outcome(run_dir: Path, outcome: dict[str, Any]) -> None:
    """Record how the run ended, because mpirun and horovodrun may return their own exit codes."""
    try:
        write_text(run_dir / OUTCOME, json.dumps(outcome) + "\n")
    except OSError as error:
        log.warning("%s not written: %s", OUTCOME, error.strerror)


def forget_outcome(run_dir: Path) -> None:
    """Remove that of an earlier attempt, "done" perhaps: this one may be killed, and then leaves none."""
    unlink_quietly(run_dir / OUTCOME)


def read_outcome(run_dir: Path) -> dict[str, Any]:
    """The outcome of the run's last attempt, with at least `exit_code` and `reason`.

    Raises FileNotFoundError if it is under way or was killed, ConfigError if the file is damaged.
    """
    outcome = _read_object(run_dir / OUTCOME, what="how the run ended", fix="see the logs of its ranks")
    if not isinstance(outcome.get("exit_code"), int):
        raise ConfigError(f"{run_dir / OUTCOME} has no exit_code", wanted="how the run ended")
    return {"reason": "", **outcome}


def outcome_stamp(run_dir: Path) -> tuple[int, int] | None:
    """A value that changes with each outcome (each is a new file); None if there is none."""
    try:
        stat = (run_dir / OUTCOME).stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def evaluation_file(run_dir: Path) -> Path:
    """Where `owt report` looks for the output of `owt evaluate --json`."""
    return run_dir / "evaluation.json"


def report_file(folder: Path) -> Path:
    """The report page of a run, in its folder; of several runs, in a folder chosen by the user."""
    return folder / "report.html"


def stacks_folder(run_dir: Path) -> Path:
    """The folder of stack dumps."""
    return run_dir / STACKS


def stacks_file(run_dir: Path, rank: int) -> Path:
    return stacks_folder(run_dir) / f"rank-{rank:04d}.txt"


def new_rank_log(run_dir: Path, attempt: int, rank: int) -> BinaryIO:
    """A new log file for this process; raises OSError.

    In an elastic job several processes may have the same rank, one after the other: the file of the second
    one is rank-0001.2.log.
    """
    folder = run_dir / LOGS
    folder.mkdir(exist_ok=True)
    folder /= f"attempt-{attempt:04d}"
    folder.mkdir(exist_ok=True)
    for number in itertools.count(1):
        more = f".{number}" if number > 1 else ""
        try:
            return (folder / f"rank-{rank:04d}{more}.log").open("xb", buffering=0)
        except FileExistsError:
            continue


def drop_old_logs(run_dir: Path) -> None:
    """Remove the log files of all but the last attempts."""
    for folder in sorted((run_dir / LOGS).glob("attempt-*"))[:-KEPT_LOGS]:
        shutil.rmtree(folder, ignore_errors=True)


def tensorboard_folder(run_dir: Path) -> Path:
    return run_dir / TENSORBOARD


def profile_trace(run_dir: Path, rank: int) -> Path:
    """A rank's trace for Perfetto; its table of operations is next to it."""
    return run_dir / PROFILE / f"rank-{rank:04d}.json.gz"


def profile_table(run_dir: Path, rank: int) -> Path:
    return run_dir / PROFILE / f"rank-{rank:04d}.txt"


def profile_files(run_dir: Path) -> list[Path]:
    """The existing traces and tables, by rank."""
    return sorted((run_dir / PROFILE).glob("rank-*"))


def timeline_file(run_dir: Path, step: int) -> Path:
    """Horovod's timeline of the ranks that started after `step`."""
    return run_dir / TIMELINE / f"step-{step:08d}.json"


def timeline_files(run_dir: Path) -> list[Path]:
    """The existing timelines, oldest first."""
    return sorted((run_dir / TIMELINE).glob("step-*.json"))
