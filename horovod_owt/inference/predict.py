"""Classify images with a trained model, in one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from horovod_owt.config import TrainConfig
from horovod_owt.data.faults import BadImages
from horovod_owt.data.feed import ValidationFeed
from horovod_owt.data.paths import PathStore
from horovod_owt.data.pipeline import make_pipeline
from horovod_owt.data.workers import usable_cores
from horovod_owt.inference.evaluate import logits_of
from horovod_owt.inference.weights import TrainedModel
from horovod_owt.parallel.device import Device

BATCH = 32


@dataclass(frozen=True)
class Prediction:
    """The best classes of an image, or why there are none."""

    path: str
    top: Sequence[tuple[int, float]] = ()  # label and probability, best first
    fault: str = ""


def predict(net: TrainedModel, paths: Sequence[str], *, top: int, device: Device) -> Iterator[Prediction]:
    """Classify the centre crop of each image, the same as in `owt evaluate`, in order."""
    on = torch.device(device.name)
    logits = logits_of(net.build(on), TrainConfig())
    feed = ValidationFeed(PathStore(paths), batch=min(BATCH, len(paths)), bad_images=BadImages())
    with make_pipeline(
        "torchvision",  # loads faster than DALI
        feed,
        image_size=net.info.image_size,
        device_id=on.index if on.type == "cuda" else None,
        num_threads=usable_cores(),
    ) as batches:
        for batch in batches:
            best = logits(batch.images).softmax(dim=1).topk(min(top, net.info.classes))
            rows = zip(batch.indices.tolist(), batch.valid.tolist(), strict=True)
            for row, (index, valid) in enumerate(rows):
                if row in batch.faults:
                    yield Prediction(paths[index], fault=batch.faults[row])
                elif valid:
                    pairs = zip(best.indices[row].tolist(), best.values[row].tolist(), strict=True)
                    yield Prediction(paths[index], top=list(pairs))
