"""Read and write checkpoints: tensors and plain values.

Tensors are whole and named as in the state dict, so a checkpoint resumes on any number of ranks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from horovod_owt.errors import RunError
from horovod_owt.runs.checkpoints import (
    AVERAGED,
    MODEL,
    OPTIMIZER,
    checkpoint_folder,
    new_checkpoint,
    read_state,
    write_state,
)


class DiskError(Exception):
    """A checkpoint could not be written."""

    def __init__(self, folder: Path, error: Exception) -> None:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        super().__init__(f"checkpoint {folder} not written: {reason}")


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to resume: tensors by name, and plain values such as its position."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]  # step, samples_consumed, epoch, validation_due, seed, config, versions, ...
    averaged: dict[str, Tensor] = field(default_factory=dict)  # moving averages; empty without ema


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint that `runs.checkpoints` has verified; hashes are not checked again.

    Raises RunError if it cannot be read.
    """
    try:
        return Checkpoint(
            model=load_file(folder / MODEL),
            optimizer=load_file(folder / OPTIMIZER),
            state=read_state(folder),
            averaged=load_file(folder / AVERAGED) if (folder / AVERAGED).exists() else {},
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise RunError(f"checkpoint {folder}: {error}", wanted="a whole checkpoint") from error


def write_checkpoint(run_dir: Path, checkpoint: Checkpoint) -> Path:
    """Write one checkpoint; raises DiskError."""
    folder = checkpoint_folder(run_dir, checkpoint.state["step"])
    try:
        with new_checkpoint(run_dir, checkpoint.state["step"]) as scratch:
            save_file(checkpoint.model, scratch / MODEL)
            save_file(checkpoint.optimizer, scratch / OPTIMIZER)
            if checkpoint.averaged:
                save_file(checkpoint.averaged, scratch / AVERAGED, metadata=_about(checkpoint.state))
            write_state(scratch, checkpoint.state)
    except (OSError, SafetensorError) as error:
        raise DiskError(folder, error) from error
    return folder


def _about(state: dict[str, Any]) -> dict[str, str]:
    """Metadata that `inference.weights` needs if the file is used without its checkpoint."""
    classes = state.get("data", {}).get("classes", [])
    return {"image_size": str(state["config"]["image_size"]), "classes": json.dumps(classes)}
