"""Checkpoints as folders that are either whole or absent: names, manifest, listing, the newest sound one.

    RUN/checkpoints/step-00001234/  model.safetensors  optimizer.safetensors  state.json  MANIFEST.json

Each is written beside its final place, fsynced and renamed; the manifest has a sha256 of each file.
`checkpoints/best.json` names the step with the best validation; that one stays, however old. What the tensors
mean is `train.checkpoint`'s to know.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from horovod_owt.errors import RunError
from horovod_owt.files import PARTIAL, atomic_folder, write_text

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
FILES = (MODEL, OPTIMIZER, STATE)
MANIFEST = "MANIFEST.json"
BEST = "best.json"


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` is, or would be."""
    return run_dir / CHECKPOINTS / f"step-{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoint folders, newest first; whatever is not named like one is left out."""
    folders = [path for path in (run_dir / CHECKPOINTS).glob("step-*") if path.name[5:].isdigit()]
    return sorted(folders, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was made."""
    return int(folder.name.removeprefix("step-"))


def read_state(folder: Path) -> dict[str, Any]:
    """state.json, unchecked; raises OSError or ValueError where it cannot be read."""
    return json.loads((folder / STATE).read_text())


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
        best = json.loads((run_dir / CHECKPOINTS / BEST).read_text())
        return {"step": int(best["step"]), "epoch": float(best["epoch"]), "top1": float(best["top1"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def note_score(run_dir: Path, *, step: int, epoch: float, top1: float) -> bool:
    """Let the checkpoint of `step` be the best one if it is; OSError if that can't be written."""
    if top1 <= read_best(run_dir).get("top1", -1.0):
        return False
    best = {"step": step, "epoch": epoch, "top1": top1}
    (run_dir / CHECKPOINTS).mkdir(exist_ok=True)
    write_text(run_dir / CHECKPOINTS / BEST, json.dumps(best) + "\n")
    return True


@contextmanager
def new_checkpoint(run_dir: Path, step: int) -> Iterator[Path]:
    """A folder to write FILES to: it gets its manifest and its name if the block succeeds."""
    folder = checkpoint_folder(run_dir, step)
    folder.parent.mkdir(exist_ok=True)  # not what is above: nothing takes a lost mount's place
    for killed in folder.parent.glob(PARTIAL):  # writes that were, of this or another step
        shutil.rmtree(killed, ignore_errors=True)
    with atomic_folder(folder, durable=True, replace=True) as scratch:  # the same step, after a resume
        yield scratch
        sums = {name: _sha256(scratch / name) for name in FILES}
        (scratch / MANIFEST).write_text(json.dumps({"sha256": sums}, indent=1) + "\n")


def write_state(folder: Path, state: dict[str, Any]) -> None:
    (folder / STATE).write_text(json.dumps(state, indent=1) + "\n")


def drop_old(run_dir: Path, *, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best."""
    best = read_best(run_dir).get("step")
    for old in list_checkpoints(run_dir)[keep:]:
        if step_of(old) != best:
            shutil.rmtree(old)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
