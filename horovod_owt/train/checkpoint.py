"""Checkpoints that are either whole or absent: safetensors, JSON, and a manifest with a sha256 of each file.

    RUN/checkpoints/step-00001234/  model.safetensors  optimizer.safetensors  state.json  MANIFEST.json

Each is written beside its final place, fsynced and renamed, by a background thread from a copy.
Tensors are whole, under the names of the state dict, so a checkpoint resumes on any number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from horovod_owt.data.arrays import sync
from horovod_owt.errors import RunError

log = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on: tensors by name, and the position in plain numbers."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]  # step, samples_consumed, epoch, seed, world_size, config, versions


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoint folders, newest first; whatever is not named like one is left out."""
    folders = [path for path in (run_dir / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    return sorted(folders, key=lambda path: int(path.name[5:]), reverse=True)


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
    """The newest checkpoint that is whole; damaged ones are named in the log and passed over."""
    for folder in list_checkpoints(run_dir):
        fault = find_fault(folder)
        if not fault:
            return folder
        log.warning("checkpoint %s passed over: %s", folder, fault)
    return None


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
    """Write one checkpoint, then drop all but the newest `keep`; raises RunError when the disk refuses."""
    folder = run_dir / "checkpoints" / f"step-{checkpoint.state['step']:08d}"
    try:
        with atomic_folder(folder) as scratch:
            save_file(checkpoint.model, scratch / "model.safetensors")
            save_file(checkpoint.optimizer, scratch / "optimizer.safetensors")
            (scratch / "state.json").write_text(json.dumps(checkpoint.state, indent=1) + "\n")
            sums = {name: _sha256(scratch / name) for name in FILES}
            (scratch / MANIFEST).write_text(json.dumps({"sha256": sums}, indent=1) + "\n")
        for old in list_checkpoints(run_dir)[keep:]:
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"checkpoint {folder} not written: {error}", fix="make room or rights there, then --resume auto"
        ) from error
    return folder


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """A folder to fill: it takes its final name when the block succeeds and is gone when it fails."""
    scratch = final.with_name(f".{final.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)  # of an attempt that was killed
    scratch.mkdir(parents=True)
    try:
        yield scratch
        for path in scratch.iterdir():
            sync(path)
        sync(scratch)
        if final.exists():  # the same step again, after a resume
            shutil.rmtree(final)
        os.replace(scratch, final)
        sync(final.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's text in one instant: a reader sees the old one or the new one."""
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(text)
    sync(scratch)
    os.replace(scratch, path)


class CheckpointWriter:
    """Writes one checkpoint at a time, off the training thread."""

    def __init__(self, run_dir: Path, *, keep: int) -> None:
        self._run_dir, self._keep = run_dir, keep
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None

    def write(self, checkpoint: Checkpoint) -> None:
        """Start writing `checkpoint`, whose tensors nobody changes any more.

        Waits for the previous one first, so that at most one copy is in memory, and raises what became of it.
        """
        self.wait()
        self._pending = self._thread.submit(write_checkpoint, self._run_dir, checkpoint, keep=self._keep)

    def wait(self) -> None:
        """Return once the last checkpoint is on disk; raises RunError if it is not."""
        pending, self._pending = self._pending, None
        if pending is not None:
            log.info("checkpoint %s", pending.result())

    def close(self) -> None:
        self._thread.shutdown(wait=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
