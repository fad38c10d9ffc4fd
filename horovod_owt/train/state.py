"""The state from which a run resumes: weights, momentum, and its position in the stream of samples."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from horovod_owt.data.copies import host_buffer, upload
from horovod_owt.errors import ConfigError
from horovod_owt.parallel import compression, runtime
from horovod_owt.parallel.collectives import broadcast_tensor, on_root
from horovod_owt.parallel.elastic import Commit, ElasticState
from horovod_owt.runs.checkpoints import checkpoint_folder, resume_at
from horovod_owt.runs.opening import Opened
from horovod_owt.runs.records import validations
from horovod_owt.train.changes import changed_settings
from horovod_owt.train.checkpoint import Checkpoint, read_checkpoint
from horovod_owt.train.replica import AVERAGE, MOMENTUM, Replica

log = logging.getLogger(__name__)
OPTIMIZER_PREFIXES = (MOMENTUM, *compression.PREFIXES)  # of tensors in a checkpoint's optimizer file


class Due(NamedTuple):
    """What a resumed run must do before its next step."""

    checkpoint: bool = False
    validation: bool = False


@dataclass
class Position:
    """A run's position in the stream of samples."""

    num_samples: int  # training images, the length of an epoch
    step: int = 0  # optimizer updates done
    consumed: int = 0  # samples of the endless stream, over all ranks

    @property
    def epoch(self) -> float:
        """Epochs done, as a fraction."""
        return self.consumed / self.num_samples


def allocate_snapshot(replica: Replica) -> dict[str, Tensor]:
    """Host memory for `snapshot`, on rank 0; empty on others.

    It is zeroed now: page faults on first use would take most of a second for 490 MB. With a GPU it is
    pinned, to copy at full bus speed.
    """
    if not replica.world.is_root:
        return {}
    shapes, device = replica.whole_shapes(), replica.world.device
    dtypes = {name: tensor.dtype for name, tensor, _ in replica.state_tensors()}
    weights = replica.strategy.weight_dtype
    return {
        name: host_buffer(shape, dtypes.get(name, weights), device).zero_() for name, shape in shapes.items()
    }


def snapshot(
    replica: Replica, position: Position, copies: dict[str, Tensor], *, validation_due: bool, **run: Any
) -> Checkpoint | None:
    """A copy of the run's state in `copies` (see `allocate_snapshot`), on rank 0; None on others.

    Every rank must call it. `validation_due` tells a resumed run to validate first; `run` has further values
    that `runs.opening` needs to resume.
    """
    whole = replica.gather()
    if not replica.world.is_root:
        return None
    for name, tensor in whole.items():
        copies[name].copy_(tensor, non_blocking=True)
    if replica.world.device.type == "cuda":
        torch.cuda.synchronize()  # once, not for each tensor
    model = {
        name: tensor for name, tensor in copies.items() if not name.startswith((*OPTIMIZER_PREFIXES, AVERAGE))
    }
    average = {name.removeprefix(AVERAGE): t for name, t in copies.items() if name.startswith(AVERAGE)}
    return Checkpoint(
        model=model,
        averaged=model | average if average else {},
        optimizer={name: tensor for name, tensor in copies.items() if name.startswith(OPTIMIZER_PREFIXES)},
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


def restore(replica: Replica, position: Position, run_dir: Path, checkpoint: Path | None) -> Due:
    """Resume from a checkpoint, if there is one: rank 0 reads it and broadcasts. Every rank must call it."""
    if checkpoint is None:
        return Due()
    found: list[Checkpoint] = []

    def read_on_root() -> dict[str, Any]:
        found.append(read_checkpoint(checkpoint))
        _check_fits(checkpoint, found[0], replica)
        log.info("resuming from %s", checkpoint)
        _warn_of_dropped_errors(found[0], replica)
        state = found[0].state
        if changed := changed_settings(state, replica.cfg, replica.world.size):
            log.warning("other settings than the checkpoint's: %s", changed)
        if replica.average and not found[0].averaged:
            log.info("the checkpoint has no average of the weights: it starts from the checkpoint's weights")
        if _optimizer_of(state) != replica.cfg.optimizer:
            log.info("the checkpoint's momentum is that of optimizer=%s: reset to 0", _optimizer_of(state))
        owed = state.get("validation_due", False) and not validations(run_dir, {state["step"]})
        return state | {"validation_due": owed, "averaged": bool(found[0].averaged)}

    state = on_root(read_on_root, "resume")
    saved = _named_tensors(found[0]) if found else {}  # on rank 0
    shapes = replica.whole_shapes()
    for name, tensor, part in replica.state_tensors():
        if name.startswith(AVERAGE) and not state["averaged"]:
            continue
        whole = upload(saved.pop(name), tensor.device).to(tensor) if found else tensor.new_empty(shapes[name])
        whole = broadcast_tensor(whole, f"restore.{name}")
        tensor.copy_(part.of(whole) if part else whole)
    replica.weights_changed()
    replica.strategy.compression.restore(saved)
    if replica.average and not state["averaged"]:
        replica.average.restart()
    if _optimizer_of(state) != replica.cfg.optimizer:
        replica.reset_momentum()
    replica.load_scaler_state(state["scaler"])
    position.step, position.consumed = state["step"], state["samples_consumed"]
    return Due(validation=state["validation_due"])


def commit(
    replica: Replica,
    position: Position,
    elastic_state: ElasticState,
    opened: Opened,
    *,
    checkpoint_due: bool = False,
    validation_due: bool = False,
) -> bool:
    """Copy this state in every rank's device memory; returns, on every rank, whether hosts changed.

    It must precede a checkpoint and a validation of the same step, so that no checkpoint is ahead of the last
    commit; if rank 0 is lost meanwhile, the next world does both.
    """
    last = elastic_state.last
    first_global_batch = last.first_global_batch if last else opened.kept_global_batch
    state = Commit(
        step=position.step,
        consumed=position.consumed,
        scaler=replica.scaler_state(),
        run_dir=opened.run_dir,
        first_global_batch=first_global_batch or replica.cfg.global_batch(replica.world.size),
        began_from=opened.began_from,
        attempt=opened.attempt,
        checkpoint_due=checkpoint_due,
        validation_due=validation_due,
    )
    tensors = {name: tensor for name, tensor, _ in replica.state_tensors()}
    return elastic_state.commit_copy(tensors | replica.strategy.compression.total(), state)


def restore_commit(replica: Replica, position: Position, elastic_state: ElasticState) -> Due:
    """Go back to the last commit, on every rank. Returns what is still due for its step."""
    for name, tensor, _ in replica.state_tensors():
        tensor.copy_(elastic_state.tensors[name])
    replica.strategy.compression.restore_total(elastic_state.tensors)
    replica.weights_changed()
    replica.load_scaler_state(elastic_state.last.scaler)
    position.step, position.consumed = elastic_state.last.step, elastic_state.last.consumed
    return Due(*on_root(lambda: _still_due(elastic_state.last), "due"))


def _still_due(last: Commit) -> Due:
    """What is still due for the commit's step, judged by what the committing world's rank 0 left on disk."""
    resume_at(last.run_dir, last.step)  # there may be a later checkpoint, of a commit that only it had
    return Due(
        checkpoint=last.checkpoint_due and not checkpoint_folder(last.run_dir, last.step).is_dir(),
        validation=last.validation_due and not validations(last.run_dir, {last.step}),
    )


def _optimizer_of(state: dict[str, Any]) -> str:
    """The optimizer of a checkpoint's momentum: LARS's includes the learning rate, SGD's does not."""
    return state.get("config", {}).get("optimizer", "sgd")


def _named_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The checkpoint's tensors by the names of `Replica.state_tensors`."""
    averaged = {f"{AVERAGE}{name}": tensor for name, tensor in checkpoint.averaged.items()}
    return checkpoint.model | checkpoint.optimizer | averaged


def _warn_of_dropped_errors(checkpoint: Checkpoint, replica: Replica) -> None:
    """Warn if this run cannot use the checkpoint's compression errors."""
    errors = {name for name in checkpoint.optimizer if name.startswith(compression.ERROR)}
    if errors - replica.whole_shapes().keys():
        log.warning(
            "the checkpoint's errors of compressed gradients (%s) are dropped with compression=%s",
            checkpoint.state["config"].get("compression"), replica.cfg.compression,
        )  # fmt: skip


def _check_fits(path: Path, checkpoint: Checkpoint, replica: Replica) -> None:
    shapes = replica.whole_shapes()
    optional = (AVERAGE, *compression.PREFIXES)
    ours = {name: shape for name, shape in shapes.items() if not name.startswith(optional)}
    theirs = {
        name: tuple(tensor.shape)
        for name, tensor in (checkpoint.model | checkpoint.optimizer).items()
        if not name.startswith(compression.PREFIXES)
    }
    odd = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if odd:
        name = odd[0]
        seen = f"{name} of shape {theirs[name]}" if name in theirs else f"no {name}"
        raise ConfigError(
            f"checkpoint {path} has {seen}",
            wanted=f"{ours.get(name, 'none')} for {replica.cfg.model} with {replica.cfg.classes} classes",
            fix="--set the model and classes it was trained with",
        )
