"""Checkpoint folders: names, manifest, listing, finding the newest intact one.

    RUN/checkpoints/step-00001234/  model.safetensors  optimizer.safetensors  state.json  MANIFEST.json
                                    average.safetensors, with a moving average of the weights

Each is written under a temporary name, fsynced and renamed; the manifest has the sha256 of each file.
`checkpoints/best.json` names the step with the best validation, which is never deleted. The tensors
themselves are read and written by `train.checkpoint`.

A run folder has a linear history, so the largest step is the newest checkpoint: a run that resumes from
a step moves later ones aside (`resume_at`); to go back, a run needs another folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from horovod_owt.errors import ConfigError, RunError, as_owt_error
from horovod_owt.files import atomic_folder, remove_folder, write_text
from horovod_owt.filesystem import PARTIAL, rename_folder
from horovod_owt.runs.folder import CONFIG
from horovod_owt.runs.records import validations

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
AVERAGED = "average.safetensors"  # only of runs with ema
FILES = (MODEL, OPTIMIZER, STATE)
MANIFEST = "MANIFEST.json"
BEST = "best.json"
ASIDE = ".damaged"  # suffix of folders that are no longer checkpoints


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """The path of the checkpoint after `step`, whether it exists or not."""
    return run_dir / CHECKPOINTS / f"step-{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoint folders, newest first; other names are ignored.

    Raises OSError if they cannot be listed; Path.glob would hide that, and the run would start from scratch.
    """
    try:
        with os.scandir(run_dir / CHECKPOINTS) as entries:
            names = [entry.name for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return []
    folders = [run_dir / CHECKPOINTS / name for name in names if re.fullmatch("step-[0-9]+", name)]
    return sorted(folders, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was made."""
    return int(folder.name.removeprefix("step-"))


def read_state(folder: Path) -> dict[str, Any]:
    """state.json, not verified; raises OSError or ValueError if it cannot be read."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def find_fault(folder: Path, files: Sequence[str] = FILES) -> str:
    """What is wrong with a checkpoint; empty if each of its `files` (by default all) matches the manifest.

    Raises RunError for system errors: a file that cannot be read now is not damaged, and a run that took it
    for damaged would go back to an older checkpoint.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        averaged = (AVERAGED,) if files is FILES and AVERAGED in manifest else ()
        for name in (*files, *averaged):
            if _sha256(folder / name) != manifest[name]:
                return f"{name} does not match {MANIFEST}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        if machine := as_owt_error(error):
            raise machine from error
        return f"unreadable: {error}"
    except (ValueError, KeyError, TypeError) as error:
        return f"unreadable: {error}"
    return ""


def intact_checkpoint(folder: Path) -> Path:
    """This checkpoint, if intact; raises ConfigError if it is not a checkpoint, RunError if it is damaged."""
    if fault := find_fault(folder):
        _check_is_checkpoint(folder)
        run = folder.parent.parent
        raise RunError(
            f"checkpoint {folder}: {fault}",
            wanted="an intact checkpoint",
            fix=f"--resume another one; `owt checkpoint verify {run}` tells which are whole",
        )
    return folder


def _check_is_checkpoint(folder: Path) -> None:
    run = folder.parent if folder.name == CHECKPOINTS else folder
    if found := list_checkpoints(run):
        raise ConfigError(
            f"{folder} has {len(found)} checkpoint{'s'[: len(found) > 1]}",
            wanted="one of them",
            fix=f"--resume {found[0]} for the newest",
        )
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} {'is a file' if folder.exists() else 'does not exist'}",
            wanted="the folder of a checkpoint, such as RUN/checkpoints/step-00001234",
        )


def newest_intact(run_dir: Path) -> Path | None:
    """The newest intact checkpoint; damaged ones are logged and skipped.

    None if there are no checkpoints. Raises RunError if all are damaged, or if they cannot be listed:
    starting from scratch would hide that.
    """
    try:
        folders = list_checkpoints(run_dir)
    except OSError as error:
        raise (as_owt_error(error) or error) from error
    place = run_dir / CHECKPOINTS
    if place.is_symlink() and not place.exists():
        raise RunError(
            f"{place} is a link to {os.readlink(place)}, which does not exist",
            wanted="the folder of the run's checkpoints",
            fix="mount its disk, or make that folder",
        )
    for folder in folders:
        fault = find_fault(folder)
        if not fault:
            return folder
        log.warning("checkpoint %s skipped: %s", folder, fault)
    if folders:
        raise RunError(
            f"{run_dir}: none of {len(folders)} checkpoints is intact, the newest: {fault}",
            wanted="an intact one to resume from",
            fix="restore one, or start with another --run-dir; `owt checkpoint verify` lists the faults",
        )
    return None


def checkpoint_to_use(path: Path, *, newest: bool = False) -> Path:
    """A checkpoint folder, or a run's best checkpoint by validation, else its newest, with intact weights.

    If the run is active and deletes a checkpoint meanwhile, it is skipped; the caller must expect that too
    when it reads the files. Raises ConfigError if there is no checkpoint, RunError if all are damaged.
    """
    if (path / MANIFEST).exists() or path.name.startswith("step-"):
        if fault := find_fault(path, (MODEL, STATE)):
            raise RunError(f"checkpoint {path}: {fault}", wanted="an intact checkpoint")
        return path
    while folders := list_checkpoints(path):
        best = None if newest else read_best(path).get("step")
        for folder in sorted(folders, key=lambda folder: step_of(folder) != best):
            if not (fault := find_fault(folder, (MODEL, STATE))):
                return folder
            if not folder.exists():
                break
            log.warning("checkpoint %s skipped: %s", folder, fault)
        else:
            raise RunError(
                f"{path}: none of {len(folders)} checkpoints is intact, the last: {fault}",
                fix="restore one; `owt checkpoint verify` lists the faults",
            )
    is_run = (path / CHECKPOINTS).is_dir() or (path / CONFIG).exists()
    raise ConfigError(
        f"{path} {'has no checkpoints yet' if is_run else 'is no run folder'}",
        wanted="a run folder with checkpoints, a checkpoint, or a .safetensors or .pth file",
    )


def resume_at(run_dir: Path, step: int) -> None:
    """Make `step` the newest checkpoint of the run, and repair best.json.

    Later ones, which are damaged, are moved aside, each with a log line.
    """
    for folder in list_checkpoints(run_dir):
        if step_of(folder) > step:
            aside = folder.with_name(folder.name + ASIDE)
            try:
                if aside.exists():
                    remove_folder(aside)
                rename_folder(folder, aside)
                log.warning("checkpoint %s moved to %s", folder, aside.name)
            except OSError as error:
                log.warning("checkpoint %s could not be moved aside: %s", folder, error.strerror)
    _repair_best(run_dir, upto=step)


def read_best(run_dir: Path) -> dict[str, Any]:
    """`step`, `epoch` and `top1` (percent) of the best validation so far; empty before the first.

    Also empty if the file is damaged, which is logged. Raises OSError if it cannot be read.
    """
    try:
        return _load_best(run_dir)
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged: %s", run_dir / CHECKPOINTS / BEST, error)
        return {}


def _load_best(run_dir: Path) -> dict[str, Any]:
    try:
        best = json.loads((run_dir / CHECKPOINTS / BEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return {"step": int(best["step"]), "epoch": float(best["epoch"]), "top1": float(best["top1"])}


def record_score(run_dir: Path, *, step: int, epoch: float, top1: float) -> bool:
    """Record the checkpoint of `step` as the best one if it is; raises OSError."""
    if top1 <= read_best(run_dir).get("top1", -1.0):
        return False
    best = {"step": step, "epoch": epoch, "top1": top1}
    write_text(run_dir / CHECKPOINTS / BEST, json.dumps(best) + "\n")
    return True


def _repair_best(run_dir: Path, *, upto: int) -> None:
    """Make best.json name the best existing checkpoint up to a step.

    It may be damaged or name a missing checkpoint, or the run may have been killed before it wrote it.
    """
    file = run_dir / CHECKPOINTS / BEST
    steps = {step_of(folder) for folder in list_checkpoints(run_dir) if step_of(folder) <= upto}
    try:
        best = read_best(run_dir)
        lost = file.exists() and best.get("step") not in steps
        if lost:
            file.unlink()
            best = {}
        later = {step for step in steps if step > best.get("step", -1)}
        for _, record in sorted(validations(run_dir, later).items()):
            score = {key: record.get(key) for key in ("step", "epoch", "top1")}
            if all(isinstance(value, (int, float)) for value in score.values()):  # not damaged
                record_score(run_dir, **score)
        if lost:
            log.warning("%s named no existing checkpoint: now %s", file, read_best(run_dir) or "none")
    except OSError as error:
        log.warning("%s could not be repaired: %s", file, error.strerror)


@contextmanager
def new_checkpoint(run_dir: Path, step: int) -> Iterator[Path]:
    """A temporary folder for FILES and perhaps AVERAGED.

    If the block succeeds, it gets a manifest and its final name.
    """
    folder = checkpoint_folder(run_dir, step)
    folder.parent.mkdir(exist_ok=True)  # not its parents: a lost mount must not be replaced by a folder
    for partial in folder.parent.glob(PARTIAL):  # interrupted writes of any step
        shutil.rmtree(partial, ignore_errors=True)
    with atomic_folder(folder, durable=True, replace=True, last=MANIFEST) as scratch:
        yield scratch
        names = (*FILES, *([AVERAGED] if (scratch / AVERAGED).exists() else []))
        sums = {name: _sha256(scratch / name) for name in names}
        (scratch / MANIFEST).write_text(json.dumps({"sha256": sums}, indent=1) + "\n", encoding="utf-8")


def write_state(folder: Path, state: dict[str, Any]) -> None:
    (folder / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def drop_old(run_dir: Path, *, keep: int, newest: int) -> list[str]:
    """Delete all checkpoints up to step `newest` except the last `keep` and the best.

    Returns messages about those that could not be deleted.
    """
    try:
        best, faults = _load_best(run_dir).get("step"), []
    except (OSError, ValueError, KeyError, TypeError) as error:  # the best one could be among them
        return [f"old checkpoints kept: {run_dir / CHECKPOINTS / BEST} cannot be read: {error}"]
    try:
        folders = [folder for folder in list_checkpoints(run_dir) if step_of(folder) <= newest]
    except OSError as error:
        return [f"old checkpoints kept: {run_dir / CHECKPOINTS}: {error.strerror or error}"]
    for old in folders[keep:]:
        if step_of(old) != best:
            try:
                remove_folder(old)
            except OSError as error:
                faults.append(f"old checkpoint {old} not deleted: {error.strerror or error}")
    return faults


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
