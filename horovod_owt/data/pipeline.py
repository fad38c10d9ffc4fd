"""From encoded batches to normalised images on the device: DALI, or torchvision as the plain reference."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

import numpy as np

from horovod_owt.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from horovod_owt.data.feed import EncodedBatch, Feed

log = logging.getLogger(__name__)

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, RGB in 0..1, as torchvision's weights expect
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Batch:
    """What a pipeline yields: b images, ready for the net, in memory that the caller may keep."""

    images: torch.Tensor  # (b, 3, S, S) float32, normalised, channels_last in memory, on the device
    labels: torch.Tensor  # (b,) int64, on the device; feed.IGNORED where not valid
    valid: torch.Tensor  # (b,) bool, on the device; False is padding, or in place of a bad image
    indices: np.ndarray  # (b,) int64, on the host, for messages
    faults: Mapping[int, str] = field(default_factory=dict)  # row -> fault, of the bad images

    @classmethod
    def of(cls, encoded: EncodedBatch, images: torch.Tensor) -> Batch:
        """What `encoded` became: `images` (b, S, S, 3), on the device."""
        from torch import from_numpy

        return cls(
            images=images.permute(0, 3, 1, 2),  # a view: the memory stays channels_last
            labels=from_numpy(encoded.labels).to(images.device, non_blocking=True),
            valid=from_numpy(encoded.valid).to(images.device, non_blocking=True),
            indices=encoded.indices,
            faults=encoded.faults,
        )

    def bad_images(self) -> dict[int, str]:
        """index -> fault"""
        return {int(self.indices[row]): fault for row, fault in self.faults.items()}


class Pipeline(Protocol):
    """An iterator of batches that works ahead in the background. Closing it closes its feed."""

    def __iter__(self) -> Iterator[Batch]: ...
    def __next__(self) -> Batch: ...
    def close(self) -> None: ...
    def __enter__(self) -> Pipeline: ...
    def __exit__(self, *exc_info) -> None: ...


def make_pipeline(
    kind: str, feed: Feed, *, image_size: int, device_id: int | None, num_threads: int
) -> Pipeline:
    """A pipeline over `feed`, with its batch size; `kind` is dali, torchvision, or auto (DALI if installed).

    `device_id` is the CUDA device that decodes and receives the batches, None the CPU.
    """
    if resolve_kind(kind) == "dali":
        from horovod_owt.data.pipeline_dali import DaliPipeline as Kind
    else:
        from horovod_owt.data.pipeline_torchvision import TorchvisionPipeline as Kind
    return Kind(feed, image_size=image_size, device_id=device_id, num_threads=num_threads)


def resolve_kind(kind: str) -> str:
    """`dali` or `torchvision`, whichever auto means here; ConfigError if unknown or not installed."""
    if kind not in ("dali", "torchvision", "auto"):
        raise ConfigError(f"pipeline={kind}", wanted="dali, torchvision or auto")
    if kind == "torchvision" or _dali_is_installed():
        return "torchvision" if kind == "torchvision" else "dali"
    if kind == "dali":
        fix = "run launch/setup, or set pipeline=torchvision"
        raise ConfigError("pipeline=dali, but DALI is not installed", fix=fix)
    log.warning("DALI is not installed: the slower torchvision pipeline decodes the images")
    return "torchvision"


def _dali_is_installed() -> bool:
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
