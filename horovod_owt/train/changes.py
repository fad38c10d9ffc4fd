"""What a resumed run does otherwise than the one that wrote its checkpoint: an option may be forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from horovod_owt.config import TrainConfig

# Keys that decide to which weights a run trains. The global batch is compared as a whole.
KEYS = (
    *("epochs", "image_size", "image_sizes", "crop_scale_min", "seed"),
    *("lr", "lr_batch", "warmup_epochs", "schedule", "momentum", "momentum_reset", "weight_decay"),
    *("optimizer", "lars_eta", "clip_norm", "ema", "dropout", "label_smoothing", "precision"),
    *("sync_bn", "fc_batch", "compression"),
)


def changed_settings(state: Mapping[str, Any], cfg: TrainConfig, world_size: int) -> str:
    """The settings that differ from those of a checkpoint's state, in words; empty if none does."""
    before, now = state.get("config", {}), cfg.to_dict()
    found = [
        f"{key}={now[key]} (was {before[key]})" for key in KEYS if key in before and before[key] != now[key]
    ]
    if {"batch", "accum_steps"} <= before.keys():
        then = before["batch"] * before["accum_steps"] * state["world_size"]
        if (ours := cfg.global_batch(world_size)) != then:
            found.append(f"global batch {ours} (was {then})")
    return ", ".join(found)
