"""Checkpoints that are either whole or absent: safetensors, JSON, and a manifest with a sha256 of each file.

    RUN/checkpoints/step-00001234/  model.safetensors  optimizer.safetensors  state.json  MANIFEST.json

Each is written beside its final place, fsynced and renamed. Tensors are whole, under the names of the state
dict, so a checkpoint resumes on any number of ranks. `checkpoints/best.json` names the step with the best
validation; that one stays, however old.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from horovod_owt.errors import RunError
from horovod_owt.files import PARTIAL, atomic_folder, write_text

log = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
BEST = "best.json"


class DiskError(Exception):
    """A checkpoint that could not be written, and why in a few words."""

    def __init__(self, folder: Path, error: Exception) -> None:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        super().__init__(f"checkpoint {folder} not written: {reason}")


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on: tensors by name, and the position in plain numbers."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]  # step, samples_consumed, epoch, validation_due, seed, config, versions, ...


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoint folders, newest first; whatever is not named like one is left out."""
    folders = [path for path in (run_dir / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    return sorted(folders, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was made."""
    return int(folder.name.removeprefix("step-"))


def find_fault(folder: Path) -> str:
    """What is wrong with a checkpoint, in a few words; empty if every file is as the manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())["sha256"]
        for name in FILES:
            if _sha256(folder / name) != manifest[name]:
                return f"{name} is not what {MANIFEST} says"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"unreadable: {error}"
    return ""


def newest_sound(run_dir: Path) -> Path | None:
    """The newest checkpoint that is whole; damaged ones are named in the log and passed over.

    None where there are no checkpoints. Raises RunError where there are some and none is whole: to start
    afresh in their place would hide what happened.
    """
    folders = list_checkpoints(run_dir)
    for folder in folders:
        fault = find_fault(folder)
        if not fault:
            return folder
        log.warning("checkpoint %s passed over: %s", folder, fault)
    if folders:
        raise RunError(
            f"{run_dir}: none of {len(folders)} checkpoints is whole, the newest: {fault}",
            wanted="a whole one to go on from",
            fix="copy one back, or start anew with another --run-dir; `owt checkpoint verify` tells all",
        )
    return None


def read_best(run_dir: Path) -> dict[str, Any]:
    """`step`, `epoch` and `top1` (percent) of the best validation so far; empty before the first."""
    try:
        best = json.loads((run_dir / "checkpoints" / BEST).read_text())
        return {"step": int(best["step"]), "epoch": float(best["epoch"]), "top1": float(best["top1"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def note_score(run_dir: Path, *, step: int, epoch: float, top1: float) -> bool:
    """Let the checkpoint of `step` be the best one if it is; OSError if that can't be written."""
    if top1 <= read_best(run_dir).get("top1", -1.0):
        return False
    best = {"step": step, "epoch": epoch, "top1": top1}
    (run_dir / "checkpoints").mkdir(exist_ok=True)
    write_text(run_dir / "checkpoints" / BEST, json.dumps(best) + "\n")
    return True


def read_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint's content; raises RunError for one that is damaged or no checkpoint at all."""
    if fault := find_fault(folder):
        raise RunError(f"checkpoint {folder}: {fault}", wanted="a whole checkpoint", fix="--resume auto")
    try:
        return Checkpoint(
            model=load_file(folder / "model.safetensors"),
            optimizer=load_file(folder / "optimizer.safetensors"),
            state=json.loads((folder / "state.json").read_text()),
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise RunError(f"checkpoint {folder}: {error}", wanted="a whole checkpoint") from error


def write_checkpoint(run_dir: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write one checkpoint, then drop all but the newest `keep` and the best; raises DiskError."""
    folder = run_dir / "checkpoints" / f"step-{checkpoint.state['step']:08d}"
    try:
        folder.parent.mkdir(exist_ok=True)  # not what is above: nothing takes a lost mount's place
        for killed in folder.parent.glob(PARTIAL):  # writes that were, of this or another step
            shutil.rmtree(killed, ignore_errors=True)
        with atomic_folder(folder, durable=True, replace=True) as scratch:  # the same step, after a resume
            save_file(checkpoint.model, scratch / "model.safetensors")
            save_file(checkpoint.optimizer, scratch / "optimizer.safetensors")
            (scratch / "state.json").write_text(json.dumps(checkpoint.state, indent=1) + "\n")
            sums = {name: _sha256(scratch / name) for name in FILES}
            (scratch / MANIFEST).write_text(json.dumps({"sha256": sums}, indent=1) + "\n")
        best = read_best(run_dir).get("step")
        for old in list_checkpoints(run_dir)[keep:]:
            if step_of(old) != best:
                shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        raise DiskError(folder, error) from error
    return folder


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
