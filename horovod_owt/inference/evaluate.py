"""Evaluate a trained model: exact counts, in total and by class, on any number of ranks."""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from horovod_owt.config import TrainConfig
from horovod_owt.data.augment import centre_crop, ten_crops
from horovod_owt.data.batch import Batch
from horovod_owt.data.store import fingerprint
from horovod_owt.errors import ConfigError
from horovod_owt.inference.outcomes import Outcomes, crops_text, summary
from horovod_owt.inference.request import Request
from horovod_owt.inference.weights import ModelInfo, TrainedModel, read_trained_model
from horovod_owt.model.alexnet_owt import AlexNetOWT
from horovod_owt.parallel import runtime
from horovod_owt.parallel.collectives import broadcast_tensor, explain_lost_ranks, gather_objects, on_root
from horovod_owt.parallel.runtime import World
from horovod_owt.parallel.step import autocast, disable_tf32
from horovod_owt.runs.opening import label_differences
from horovod_owt.train.agreement import check_agreement
from horovod_owt.train.bad_images import BadImageLog
from horovod_owt.train.evaluate import places
from horovod_owt.train.pipelines import validation_pipeline

log = logging.getLogger(__name__)

VIEWS = {1: centre_crop, 10: ten_crops}  # by number of crops
LOG_EVERY_S = 10.0

Logits = Callable[[Tensor], Tensor]  # images (b, 3, S, S) -> (b, classes)


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation, on rank 0."""

    report: dict[str, Any]  # for --json
    outcomes: Outcomes
    names: tuple[str, ...]  # of the model's outputs


def evaluate(
    request: Request, checkpoint: Path, *, crops: int, newest: bool, confused: int
) -> Evaluation | None:
    """Evaluate on all ranks; returns None except on rank 0. Every rank must call it.

    Rank 0 reads the weights and broadcasts them. Raises OwtError.
    """
    cfg, images = request.cfg, request.images
    world = runtime.init(request.device, stall_limit_s=cfg.stall_limit_s)
    with explain_lost_ranks():
        check_agreement(cfg, fingerprint(images), request.device, world)
        info, model = _broadcast_model(checkpoint, newest, images.classes, world)
        if request.own_size:
            cfg = dataclasses.replace(cfg, image_size=info.image_size)
        if world.is_root:
            log.info("%s, %d classes, weights of %s", info.model, info.classes, info.source)
            log.info(
                "%d images, %s of %d px, %s | %d rank%s, %s",
                len(images), crops_text(crops), cfg.image_size, cfg.precision,
                world.size, "s"[: world.size > 1], world.device,
            )  # fmt: skip
        bad_images = BadImageLog(images, world)
        with validation_pipeline(
            cfg, images, world, bad_images=bad_images.known, view=VIEWS[crops]
        ) as batches:
            shown = _with_progress(bad_images.collect(batches), len(images), world)
            own = list(rows_of(shown, logits_of(model, cfg), crops))
        rows = [row for theirs in gather_objects(own, "outcomes") for row in theirs]
        if len(rows) < len(images):
            if cfg.bad_images == "fail" or not rows:
                raise bad_images.fatal_error(none_is_good=not rows)
            bad_images.announce()
        versions = runtime.versions()
    runtime.shutdown()
    if not world.is_root:
        return None
    outcomes = Outcomes.of(rows, images.labels)
    names = (*images.classes, *map(str, range(len(images.classes), info.classes)))
    report = {
        **summary(outcomes, images.classes, names, confused),
        "bad_images": len(images) - len(rows),
        "crops": crops,
        "checkpoint": str(info.source),
        "step": info.step,
        "data": str(request.data),
        "model": info.model,
        **{key: getattr(cfg, key) for key in ("image_size", "precision", "pipeline")},
        "ranks": world.size,
        "versions": versions,
    }
    return Evaluation(report, outcomes, names)


def logits_of(model: AlexNetOWT, cfg: TrainConfig) -> Logits:
    """The model as a function from images to logits, in the precision of `cfg`."""
    device = next(model.parameters()).device
    disable_tf32()
    if cfg.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    model = model.double() if cfg.precision == "fp64" else model
    model = model.to(memory_format=torch.channels_last) if cfg.channels_last else model
    dtype = next(model.parameters()).dtype

    def logits(images: Tensor) -> Tensor:
        with torch.inference_mode(), autocast(cfg.precision, device):
            return model(images.to(dtype)).float()

    return logits


def scores_of(images: Tensor, logits: Logits, crops: int) -> Tensor:
    """The logits of a batch, or with ten crops the log of their mean probabilities: (b, classes).

    `images` are (b, 3, S, S), or (6*b, 3, S, S) from `ten_crops`.
    """
    if crops == 1:
        return logits(images)
    *corners, centre, to_mirror = images.chunk(6)
    views = [*corners, centre, *(crop.flip(-1) for crop in (*corners, to_mirror))]
    return sum(logits(view).double().softmax(dim=1) for view in views).div(len(views)).log()


def check_classes(info: ModelInfo, classes: Sequence[str]) -> None:
    """Raise ConfigError if the model's classes are not those of the data set."""
    differs = label_differences(info.class_names, classes) if info.class_names else ""
    if not info.class_names and info.classes != len(classes):
        differs = f"{info.classes}, the data set has {len(classes)}"
    if differs:
        raise ConfigError(
            f"{info.source} has other classes: {differs}",
            wanted="the classes of the data set",
            fix="evaluate it on the data set that it was trained on",
        )


def _broadcast_model(
    checkpoint: Path, newest: bool, classes: Sequence[str], world: World
) -> tuple[ModelInfo, AlexNetOWT]:
    found: list[TrainedModel] = []

    def read_on_root() -> ModelInfo:
        found.append(read_trained_model(checkpoint, newest=newest))
        check_classes(found[0].info, classes)
        return found[0].info

    info = on_root(read_on_root, "weights", kind=ModelInfo)
    model = found[0].build(world.device) if found else info.empty_model(world.device)
    if world.size > 1:
        for name, tensor in model.state_dict().items():
            tensor.copy_(broadcast_tensor(tensor, f"weights.{name}"))
    return info, model


def rows_of(batches: Iterable[Batch], logits: Logits, crops: int) -> Iterator[list[float]]:
    """(index, position of the label by score, predicted class, loss) of each good image."""
    for batch in batches:
        valid = batch.valid.nonzero()[:, 0]
        images, labels = batch.images, batch.labels
        if len(valid) < len(labels):  # a bad image, or the padding of the last batch, which may be most of it
            images = images.unflatten(0, (-1, len(labels)))[:, valid].flatten(0, 1)
            labels = labels[valid]
        scores = scores_of(images, logits, crops)
        losses = F.cross_entropy(scores, labels, reduction="none")
        columns = [places(scores, labels), scores.argmax(dim=1), losses]
        table = torch.stack([each.double() for each in columns], dim=1).tolist()
        indices = batch.indices[valid.tolist()].tolist()
        for index, (place, predicted, loss) in zip(indices, table, strict=True):
            yield [index, int(place), int(predicted), loss]


def _with_progress(batches: Iterable[Batch], images: int, world: World) -> Iterator[Batch]:
    """Yield the batches; rank 0 shows the progress of all ranks, as a bar on a terminal, else in the log."""
    if not world.is_root:
        yield from batches
        return
    start = shown = time.monotonic()
    done = 0
    with tqdm(total=images, unit="image", disable=not sys.stderr.isatty()) as bar:
        for batch in batches:
            yield batch
            now, done = time.monotonic(), min(images, done + world.size * len(batch.valid))
            bar.update(done - bar.n)
            if bar.disable and now - shown > LOG_EVERY_S:
                shown = now
                log.info("about %d of %d images | %.0f img/s", done, images, done / (now - start))
