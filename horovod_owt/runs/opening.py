"""Open a run folder: take ownership, and choose the checkpoint to resume from.

    --resume   in a folder without checkpoints   in one that has some
    auto       initial weights                   the newest valid one
    PATH       PATH                              the same, if the run started from PATH; else refused
    never      initial weights                   the same, if this job wrote it; else refused

A folder whose records mention checkpoints that are gone is refused, except with `never`.
So a requeued or restarted job resumes where it stopped, whatever its --resume option. The history of a folder
is linear: to go back, start from the earlier checkpoint in another folder.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from horovod_owt.config import TrainConfig
from horovod_owt.errors import ConfigError, RunError
from horovod_owt.files import real_path, users_path
from horovod_owt.runs.attempts import is_same_job, next_start
from horovod_owt.runs.checkpoints import intact_checkpoint, newest_intact, read_state, resume_at, step_of
from horovod_owt.runs.control import withdraw_stale
from horovod_owt.runs.folder import forget_outcome, write_config
from horovod_owt.runs.owner import Ownership
from horovod_owt.runs.records import Start, checkpoint_recorded

log = logging.getLogger(__name__)

# Keys that a resumed run must not change: they determine weight shapes and sample order.
FIXED_KEYS = ("model", "classes", "image_size", "seed", "optimizer")


@dataclass(frozen=True)
class Resume:
    """The resume options of a command."""

    how: str = "auto"  # auto, never or the path of a checkpoint
    other_data: bool = False  # allow another data set than the checkpoint's


@dataclass(frozen=True)
class Opened:
    """A run folder that was opened, with what the run needs to know about it."""

    run_dir: Path
    checkpoint: Path | None = None  # to resume from, verified by sha256; None: initial weights
    began_from: str = ""  # the --resume PATH that the run in this folder started from
    attempt: int = 1
    job_id: str | None = None
    kept_global_batch: int = 0  # elastic_batch=keep: of the checkpoint or the first world; 0: unknown

    @property
    def start(self) -> Start:
        return Start(self.attempt, self.job_id)


def open_run_folder(
    run_dir: Path | None,
    cfg: TrainConfig,
    data: Mapping[str, Any],
    resume: Resume,
    ownership: Ownership,
) -> Opened:
    """Create or reopen the run folder and take ownership; `None` creates a new one.

    `data` is the data set's identity. Raises ConfigError if another process owns the folder, or if its run
    cannot be resumed as asked, or with `cfg` or `data`; RunError if all its checkpoints are damaged.
    """
    try:
        return _open(run_dir, cfg, data, resume, ownership)
    except OSError as error:
        raise ConfigError(
            f"run folder {run_dir or 'runs'}: {error.strerror}",
            wanted="a folder to write to",
            fix="--run-dir ELSEWHERE",
        ) from None


def _open(
    run_dir: Path | None, cfg: TrainConfig, data: Mapping[str, Any], resume: Resume, ownership: Ownership
) -> Opened:
    if run_dir is None:
        run_dir = _new_folder(Path("runs") / f"{cfg.model}-{time.strftime('%Y%m%d-%H%M%S')}")
    run_dir = real_path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    ownership.take(run_dir)
    withdraw_stale(run_dir, ownership.since)
    opened = _choose_checkpoint(run_dir, resume)
    checkpoint = opened.checkpoint
    own = checkpoint is not None and checkpoint.parent.parent == run_dir
    if own:
        _check_config(checkpoint, cfg)
    if checkpoint is not None:
        _check_data(checkpoint, data, other_data=resume.other_data)
    resume_at(run_dir, step_of(checkpoint) if own else 0)
    write_config(run_dir, cfg.to_dict())
    forget_outcome(run_dir)
    return dataclasses.replace(opened, **dataclasses.asdict(next_start(run_dir, os.environ)))


def _new_folder(path: Path) -> Path:
    """A new folder; runs that start in the same second get different ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for folder in itertools.chain([path], (path.with_name(f"{path.name}-{n}") for n in itertools.count(2))):
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue


def _choose_checkpoint(run_dir: Path, resume: Resume) -> Opened:
    path = "" if resume.how in ("auto", "never") else str(real_path(users_path(resume.how)))
    own = newest_intact(run_dir)
    if own is None:
        if resume.how != "never":
            _check_never_saved(run_dir)
        return Opened(run_dir, intact_checkpoint(Path(path)) if path else None, path)
    state = read_state(own)
    began_from = state.get("began_from", "")
    if resume.how == "never" and not is_same_job(state.get("job", ""), os.environ):
        raise ConfigError(
            f"run folder {run_dir} contains a run with checkpoints",
            wanted="a new folder for --resume never",
            fix="--resume auto to resume it, or another --run-dir",
        )
    if path and path not in (began_from, str(real_path(own))):
        raise ConfigError(
            f"run folder {run_dir} is at step {step_of(own)}, begun from {began_from or 'initial weights'}; "
            f"--resume {resume.how} would go back",
            wanted="a linear history in a run folder",
            fix=f"--resume auto to resume from step {step_of(own)}, "
            f"or another --run-dir to start from {resume.how}",
        )
    if path and path != str(real_path(own)):
        log.info("this run started from --resume %s: resuming from its own newest checkpoint", resume.how)
    kept_global_batch = state.get("kept_global_batch", 0)
    return Opened(run_dir, own, path or began_from, kept_global_batch=kept_global_batch)


def _check_never_saved(run_dir: Path) -> None:
    """Refuse to start anew where a disk has lost what a run did: a purged scratch, a folder not mounted."""
    if step := checkpoint_recorded(run_dir):
        raise RunError(
            f"run folder {run_dir} has records of a checkpoint after step {step}, but no checkpoints",
            wanted="the checkpoints, to resume",
            fix="restore them, or --resume never to start from initial weights",
        )


def _check_config(checkpoint: Path, cfg: TrainConfig) -> None:
    before, now = read_state(checkpoint).get("config", {}), cfg.to_dict()
    for key in FIXED_KEYS:
        if key in before and before[key] != now[key]:
            raise ConfigError(
                f"checkpoint {checkpoint} was trained with {key}={before[key]}, now {key}={now[key]}",
                wanted="the same value to resume",
                fix=f"--set {key}={before[key]}, or another --run-dir",
            )


def _check_data(checkpoint: Path, data: Mapping[str, Any], *, other_data: bool) -> None:
    state = read_state(checkpoint)
    differs = data_differences(state.get("data") or {"train_images": state["num_samples"]}, data)
    if differs and other_data:
        log.warning("checkpoint %s was made on another data set: %s", checkpoint, differs)
    elif differs:
        raise ConfigError(
            f"checkpoint {checkpoint} was made on another data set: {differs}",
            wanted="the same data set to resume",
            fix="use that data set, or another --run-dir; --other-data resumes on this one",
        )


def data_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How two data sets differ, as text; keys missing in `before` are not compared."""
    found = []
    for key, what in (("train_images", "training images"), ("val_images", "validation images")):
        if before.get(key, now[key]) != now[key]:
            found.append(f"{before[key]} {what}, now {now[key]}")
    if differs := label_differences(before.get("classes", now["classes"]), now["classes"]):
        found.append(differs)
    if not found and before.get("fingerprint", now["fingerprint"]) != now["fingerprint"]:
        found.append("other file names, or files in other classes")
    return "; ".join(found)


def label_differences(before: Sequence[str], now: Sequence[str]) -> str:
    """How the classes of labels differ; empty if they do not."""
    classes = list(itertools.zip_longest(before, now, fillvalue="none"))
    odd = [(label, old, new) for label, (old, new) in enumerate(classes) if old != new]
    if not odd:
        return ""
    label, old, new = odd[0]
    return f"{len(odd)} of {len(classes)} labels changed class, first {label}: {old}, now {new}"
