"""Checks of an evaluation before ranks connect, while no peer waits in a collective."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from horovod_owt.config import FIELDS, TrainConfig, resolve
from horovod_owt.data.pipeline import resolve_kind
from horovod_owt.data.store import Store, open_validation_set
from horovod_owt.errors import ConfigError, OwtError
from horovod_owt.files import real_path
from horovod_owt.parallel.device import Device
from horovod_owt.topology import rank_topology
from horovod_owt.train.prepare import choose_device

# The keys of the configuration that an evaluation uses.
KEYS = (
    *("batch", "image_size", "precision", "channels_last", "deterministic"),
    *("pipeline", "decode_threads", "bad_images", "stall_limit_s"),
)


@dataclass(frozen=True)
class Request:
    """A request to evaluate, validated as far as one rank can by itself."""

    cfg: TrainConfig
    own_size: bool  # whether to use the image size that the model was trained with
    data: Path
    images: Store
    device: Device


def prepare_evaluation(data: Path, settings: tuple[str, ...]) -> Request:
    """Check the settings, open the validation images, choose the device; raises OwtError."""
    topology = rank_topology()
    try:
        keys = [setting.partition("=")[0].strip() for setting in settings]
        for key in keys:
            if key in FIELDS and key not in KEYS:
                raise ConfigError(f"--set {key}", wanted=f"a key that evaluation uses: {', '.join(KEYS)}")
        cfg = resolve(None, settings)
        cfg = dataclasses.replace(cfg, pipeline=resolve_kind(cfg.pipeline))
        images = open_validation_set(data)
        device = choose_device(cfg, topology)
    except OwtError as error:
        error.on_every_rank()
        raise
    return Request(cfg, "image_size" not in keys, real_path(data), images, device)
