"""The output of pipelines: normalised images on the device, with their labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from horovod_owt.data.copies import upload
from horovod_owt.data.feed import EncodedBatch

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, RGB in 0..1, as torchvision's weights expect
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Batch:
    """b images, ready for the net, in memory that the caller may keep.

    Of a view with K crops `images` has K * b rows: the first crop of each image, then the second ones.
    """

    images: torch.Tensor  # (K*b, 3, S, S) float32, normalised, channels_last in memory, on the device
    labels: torch.Tensor  # (b,) int64, on the device; feed.IGNORED where not valid
    valid: torch.Tensor  # (b,) bool, on the device; False for padding and in place of a bad image
    indices: np.ndarray  # (b,) int64, on the host, for messages
    faults: Mapping[int, str] = field(default_factory=dict)  # row -> fault, for bad images

    @classmethod
    def of(cls, encoded: EncodedBatch, images: torch.Tensor) -> Batch:
        """The batch of `encoded`, decoded to `images` (K*b, S, S, 3) on the device."""
        return cls(
            images=images.permute(0, 3, 1, 2),  # a view: the memory stays channels_last
            labels=upload(encoded.labels, images.device),
            valid=upload(encoded.valid, images.device),
            indices=encoded.indices,
            faults=encoded.faults,
        )

    def bad_images(self) -> dict[int, str]:
        """index -> fault"""
        return {int(self.indices[row]): fault for row, fault in self.faults.items()}


class Pipeline(Protocol):
    """An iterator of batches that prefetches in the background. Closing it closes its feed."""

    def __iter__(self) -> Iterator[Batch]: ...
    def __next__(self) -> Batch: ...
    def close(self) -> None: ...
    def __enter__(self) -> Pipeline: ...
    def __exit__(self, *exc_info) -> None: ...
