"""Summarize a run folder as one JSON document: the content of the page and of `owt report --json`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

from horovod_owt.config import TrainConfig
from horovod_owt.errors import ConfigError
from horovod_owt.report.evaluation import evaluation_of
from horovod_owt.report.formats import integer, is_number
from horovod_owt.report.series import clock_of, curves, finite, rounded
from horovod_owt.report.shares import step_shares
from horovod_owt.report.timeline import (
    checkpoints_of,
    events_of,
    is_image,
    list_of,
    since_begin,
    starts_of,
)
from horovod_owt.report.wire import bytes_on_the_wire
from horovod_owt.runs.folder import (
    evaluation_file,
    outcome_stamp,
    profile_files,
    read_config,
    read_outcome,
    timeline_files,
)
from horovod_owt.runs.goodput import goodput
from horovod_owt.runs.history import History, moment_of, read_history
from horovod_owt.runs.owner import active_owner
from horovod_owt.runs.records import METRICS, utc
from horovod_owt.text import without_nan

DEFAULTS = TrainConfig().to_dict()
MAX_IMAGES = 100  # bad images listed by name
SCORES = ("epoch", "step", "images", "correct_top1", "correct_top5", "top1", "top5", "loss")


def summarize_all(
    run_dirs: Sequence[Path], *, max_points: int, evaluation: Path | None = None
) -> list[dict[str, Any]]:
    """`summarize` each run, with unique names. `evaluation`, a file, needs a single run."""
    if evaluation and len(run_dirs) > 1:
        raise ConfigError(
            "--evaluation with several runs",
            wanted="one run",
            fix=f"copy each to its run folder: cp {evaluation} {evaluation_file(run_dirs[0])}",
        )
    found = [summarize(run_dir, max_points=max_points, evaluation=evaluation) for run_dir in run_dirs]
    return [run | {"name": name} for run, name in zip(found, names_of(run_dirs), strict=True)]


def names_of(run_dirs: Sequence[Path]) -> list[str]:
    """The folders' names; for folders with equal names, their paths."""
    names = [run_dir.resolve().name for run_dir in run_dirs]
    counts = Counter(names)
    return [
        name if counts[name] == 1 else str(run_dir) for name, run_dir in zip(names, run_dirs, strict=True)
    ]


def summarize(run_dir: Path, *, max_points: int, evaluation: Path | None = None) -> dict[str, Any]:
    """Facts and curves of a run; raises ConfigError if the folder is not a run's or has no records."""
    history = history_of(run_dir)
    clock = clock_of(history)
    last = history.starts[-1].record if history.starts else {}
    outcome, notes = _outcome(run_dir, history)
    events, events_left_out = events_of(history, clock)
    config = _config(run_dir, last, notes)
    if history.damaged:
        lines = f"{history.damaged} damaged line{'s'[: history.damaged != 1]}"
        notes.append(f"{METRICS}: {lines} skipped, the first: {history.first_damaged}")
    found = {
        "name": run_dir.resolve().name,
        "path": str(run_dir),
        **_state(run_dir, history, outcome),
        "notes": notes,
        "began": _utc(history.began_at()),
        "ended": _utc(history.ended_at()),
        "wall_s": _wall_s(history, clock),
        "has_times": history.has_times(),
        "data": last.get("data"),
        "train_images": integer(last.get("train_images")),
        "val_images": integer(last.get("val_images")),
        "world_size": integer(last.get("world_size")),
        "hosts": dict(Counter(map(str, list_of(last.get("hosts"))))),
        "global_batch": integer(last.get("global_batch")),
        "config": config,
        "changed": {key: value for key, value in config.items() if _is_changed(key, value)},
        "versions": last.get("versions") if isinstance(last.get("versions"), dict) else {},
        "figures": _figures(history),
        "validations": validations_of(history, clock),
        "starts": starts_of(run_dir, history, clock),
        "events": events,
        "events_left_out": events_left_out,
        "checkpoints": checkpoints_of(history, clock),
        "step_shares": step_shares(history),
        "bytes": bytes_on_the_wire(history),
        "goodput": _goodput(run_dir, notes),
        "bad_images": _bad_images(history, outcome),
        "evaluation": _evaluation(run_dir, evaluation, notes),
        "traces": [str(file) for file in [*profile_files(run_dir), *timeline_files(run_dir)]],
        "curves": curves(history, max_points),
    }
    return without_nan(found)


def validations_of(history: History, clock: Sequence[float]) -> list[dict[str, Any]]:
    """Scores and times of the validations, without those of lost steps."""
    return [
        {
            **{name: event.record.get(name) for name in SCORES},
            "time": since_begin(history, moment_of(event.record), event.row, clock),
        }
        for event in history.validations
    ]


def history_of(run_dir: Path) -> History:
    """The run's history; raises ConfigError if it has none."""
    history = read_history(run_dir)
    if history.lines:
        return history
    if not run_dir.is_dir():
        saw = f"{run_dir} is a file" if run_dir.exists() else f"{run_dir} does not exist"
    elif not (run_dir / METRICS).exists():
        saw = f"{run_dir} has no {METRICS}"
    else:
        saw = f"{run_dir} has no records yet: {METRICS} is empty"
    raise ConfigError(saw, wanted="the --run-dir of a run that has begun")


def _outcome(run_dir: Path, history: History) -> tuple[dict[str, Any], list[str]]:
    """The outcome of the newest start, empty if there is none, and notes about a damaged one."""
    try:
        outcome, notes = read_outcome(run_dir), []
    except FileNotFoundError:
        return {}, []
    except ConfigError as error:
        outcome, notes = {}, [error.saw]
    own = [event for event in history.of_kind("outcome") if event.start == len(history.starts) - 1]
    if own:
        return own[-1].record | outcome, notes
    # A rank that aborts writes the file only. A later start appends to the records, so the file is then
    # older.
    written = outcome_stamp(run_dir)[1]
    return (outcome, notes) if written >= (run_dir / METRICS).stat().st_mtime_ns else ({}, notes)


def _state(run_dir: Path, history: History, outcome: Mapping[str, Any]) -> dict[str, Any]:
    """The run's state in a word, its reason, and the exit code if it has ended."""
    if outcome:
        code = integer(outcome.get("exit_code"))
        word = {0: "done", 75: "stopped"}.get(code, "failed")
        return {"state": word, "reason": str(outcome.get("reason", "")), "exit_code": code}
    if owner := active_owner(run_dir):
        return {"state": "running", "reason": str(owner), "exit_code": None}
    reason = "The last start wrote no outcome: its process was killed, or its host went down."
    return {"state": "ended", "reason": reason, "exit_code": None}


def _config(run_dir: Path, last: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    if isinstance(last.get("config"), dict):
        return last["config"]
    try:
        return read_config(run_dir)
    except ConfigError as error:
        notes.append(error.saw)
        return {}


def _is_changed(key: str, value: Any) -> bool:
    return key in DEFAULTS and value != DEFAULTS[key]


def _goodput(run_dir: Path, notes: list[str]) -> dict[str, Any] | None:
    """From runs.goodput; None for records without times."""
    try:
        found = goodput(run_dir)
    except (TypeError, ValueError, ArithmeticError) as error:  # a value of another type in a damaged record
        notes.append(f"no goodput: {error}")
        return None
    return found and {**found.to_dict(), "shares": found.shares()}


def _evaluation(run_dir: Path, file: Path | None, notes: list[str]) -> dict[str, Any] | None:
    """The evaluation; a damaged one becomes a note, unless `file` was asked for: then ConfigError."""
    try:
        return evaluation_of(run_dir, file)
    except ConfigError as error:
        if file:
            raise
        notes.append(error.saw)
        return None


def _wall_s(history: History, clock: Any) -> float | None:
    if history.has_times():
        return rounded(history.ended_at() - history.began_at())
    return rounded(clock[-1]) if len(clock) else None


def _figures(history: History) -> dict[str, Any]:
    """The run in a few numbers; lost steps count only in `lost_steps`."""
    steps = history.steps
    kept = [row for row, is_kept in enumerate(steps.kept) if is_kept]
    last = kept[-1] if kept else None
    best = max(history.validations, key=lambda event: _score(event.record), default=None)
    newest = history.validations[-1].record if history.validations else {}
    step_ms = _kept(history, "step_ms")
    total = math.fsum(step_ms)
    return {
        "steps": steps.step[last] if last is not None else 0,
        "epoch": rounded(steps["epoch"][last]) if last is not None else None,
        "loss": rounded(steps["loss"][last]) if last is not None else None,
        "lr": rounded(steps["lr"][last]) if last is not None else None,
        "images_per_s": _quartiles(_kept(history, "images_per_s")),
        "step_ms": _quartiles(step_ms),
        "data_wait_share": rounded(math.fsum(_kept(history, "data_wait_ms")) / total) if total else None,
        "exposed_comm_share": rounded(math.fsum(_kept(history, "exposed_comm_ms")) / total)
        if total
        else None,
        "lost_steps": len(steps) - len(kept),
        "top1": newest.get("top1"),
        "top5": newest.get("top5"),
        "best": {name: best.record.get(name) for name in ("step", "epoch", "top1")} if best else None,
        "records": history.lines,
        "damaged_records": history.damaged,
    }


def _score(validation: Mapping[str, Any]) -> float:
    top1 = validation.get("top1")
    return top1 if is_number(top1) else -1.0


def _kept(history: History, name: str) -> list[float]:
    return finite(
        [value for value, kept in zip(history.steps[name], history.steps.kept, strict=True) if kept]
    )


def _quartiles(values: list[float]) -> dict[str, Any] | None:
    if not values:
        return None
    p25, median, p75 = quantiles(values, n=4, method="inclusive") if values[1:] else values * 3
    return {"min": rounded(min(values)), "p25": rounded(p25), "median": rounded(median), "p75": rounded(p75)}


def _bad_images(history: History, outcome: Mapping[str, Any]) -> dict[str, Any]:
    """Images that were skipped or ended the run: their number, their faults, and the first by name."""
    images: dict[str, dict[str, Any]] = {}
    for event in history.events:
        if is_image(event):
            images.setdefault(str(event.record["path"]), event.record)
    counted = integer(outcome.get("bad_images"))
    return {
        "count": max(len(images), counted or 0),
        "faults": dict(Counter(str(image.get("fault")) for image in images.values()).most_common()),
        "images": [
            {"path": path, **{key: image.get(key) for key in ("fault", "rank", "step")}}
            for path, image in list(images.items())[:MAX_IMAGES]
        ],
    }


def _utc(moment: float) -> str | None:
    return None if math.isnan(moment) else utc(moment)
