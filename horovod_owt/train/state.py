"""All that a run must remember to go on: weights, momentum, and its place in the stream of samples."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from horovod_owt.errors import ConfigError
from horovod_owt.parallel import runtime
from horovod_owt.parallel.collectives import broadcast_tensor, on_root
from horovod_owt.parallel.elastic import Committed
from horovod_owt.runs.records import validations
from horovod_owt.train.checkpoint import Checkpoint, read_checkpoint
from horovod_owt.train.replica import MOMENTUM, Replica

log = logging.getLogger(__name__)


@dataclass
class Position:
    """How far a run has come."""

    num_samples: int  # training images, the length of an epoch
    step: int = 0  # optimizer updates done
    consumed: int = 0  # samples of the endless stream, over all ranks

    @property
    def epoch(self) -> float:
        """Epochs done, with the fraction."""
        return self.consumed / self.num_samples


def room_for_copies(replica: Replica) -> dict[str, Tensor]:
    """Memory for `snapshot` on rank 0, nothing on others.

    Written to now: Linux gives pages at the first touch, which for 490 MB takes most of a second.
    """
    if not replica.world.is_root:
        return {}
    shapes = replica.whole_shapes()
    return {
        name: torch.empty(shapes[name], dtype=tensor.dtype).zero_() for name, tensor, _ in replica.parts()
    }


def snapshot(
    replica: Replica, position: Position, copies: dict[str, Tensor], *, validation_due: bool, **run: Any
) -> Checkpoint | None:
    """A copy of the run's state that later steps leave alone, on rank 0. Every rank must call it.

    It is made in `copies`, from `room_for_copies`; `validation_due`: whether this state is to be validated.
    `run` is what else `runs.opening` wants to know when the run is resumed.
    """
    whole = replica.gather()
    if not replica.world.is_root:
        return None
    for name, tensor in whole.items():
        copies[name].copy_(tensor)
    return Checkpoint(
        model={name: tensor for name, tensor in copies.items() if not name.startswith(MOMENTUM)},
        optimizer={name: tensor for name, tensor in copies.items() if name.startswith(MOMENTUM)},
        state={
            "step": position.step,
            "epoch": position.epoch,
            "samples_consumed": position.consumed,
            "num_samples": position.num_samples,
            "validation_due": validation_due,
            "seed": replica.cfg.seed,
            "world_size": replica.world.size,
            "scaler": replica.scaler_state(),
            "config": replica.cfg.to_dict(),
            "versions": runtime.versions(),
            **run,
        },
    )


def restore(replica: Replica, position: Position, run_dir: Path, checkpoint: Path | None) -> bool:
    """Go on where a checkpoint stopped, if there is one: rank 0 reads it, all receive. Every rank calls it.

    Returns whether the run ended before it had validated that state.
    """
    if checkpoint is None:
        return False
    found: list[Checkpoint] = []

    def read_on_root() -> dict[str, Any]:
        found.append(read_checkpoint(checkpoint))
        _check_fits(checkpoint, found[0], replica)
        log.info("resuming from %s", checkpoint)
        state = found[0].state
        owed = state.get("validation_due", False) and not validations(run_dir, {state["step"]})
        return state | {"validation_due": owed}

    state = on_root(read_on_root, "resume")
    saved = found[0].model | found[0].optimizer if found else {}  # on rank 0
    shapes = replica.whole_shapes()
    for name, tensor, part in replica.parts():
        whole = saved.pop(name).to(tensor) if found else tensor.new_empty(shapes[name])
        whole = broadcast_tensor(whole, f"restore.{name}")
        tensor.copy_(part.of(whole) if part else whole)
    replica.weights_changed()
    replica.load_scaler_state(state["scaler"])
    position.step, position.consumed = state["step"], state["samples_consumed"]
    return state["validation_due"]


def commit(replica: Replica, position: Position, committed: Committed, values: dict[str, Any]) -> None:
    """Keep this state in the memory of every rank; raises, on all, what lets an elastic job regroup."""
    tensors = {name: tensor for name, tensor, _ in replica.parts()}
    place = {"step": position.step, "consumed": position.consumed, "scaler": replica.scaler_state()}
    committed.commit_copy(tensors, {**values, **place})


def restore_commit(replica: Replica, position: Position, committed: Committed) -> bool:
    """Go back to what was committed, as every rank does; nothing is left to validate."""
    for name, tensor, _ in replica.parts():
        tensor.copy_(committed.tensors[name])
    replica.weights_changed()
    replica.load_scaler_state(committed.values["scaler"])
    position.step, position.consumed = committed.step, committed.values["consumed"]
    return False


def _check_fits(path: Path, checkpoint: Checkpoint, replica: Replica) -> None:
    ours = replica.whole_shapes()
    theirs = {name: tuple(t.shape) for name, t in (checkpoint.model | checkpoint.optimizer).items()}
    odd = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if odd:
        raise ConfigError(
            f"checkpoint {path} has {odd[0]} of shape {theirs.get(odd[0])}",
            wanted=f"{ours.get(odd[0])} for {replica.cfg.model} with {replica.cfg.classes} classes",
            fix="--set the model and classes it was trained with",
        )
