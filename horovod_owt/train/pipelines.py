"""One rank's batches: of the endless training stream, and of its slice of the validation set."""

from __future__ import annotations

from horovod_owt.config import TrainConfig
from horovod_owt.data.augment import View, centre_crop
from horovod_owt.data.batch import Pipeline
from horovod_owt.data.faults import BadImages
from horovod_owt.data.feed import Feed, TrainFeed, ValidationFeed
from horovod_owt.data.pipeline import make_pipeline
from horovod_owt.data.store import DataSet, Store
from horovod_owt.parallel.runtime import World


def training_pipeline(
    cfg: TrainConfig,
    folder: DataSet,
    world: World,
    *,
    position: int = 0,
    bad_images: BadImages | None = None,
) -> Pipeline:
    """Endless micro-batches from `position` (samples consumed by all ranks so far) on.

    Without `bad_images`, here and below, a bad image raises RunError.
    """
    feed = TrainFeed(
        folder.train,
        seed=cfg.seed,
        batch=cfg.batch,
        rank=world.rank,
        world_size=world.size,
        accum_steps=cfg.accum_steps,
        position=position,
        scale=(cfg.crop_scale_min, 1.0),
        bad_images=bad_images,
    )
    return _pipeline(cfg, feed, world)


def validation_pipeline(
    cfg: TrainConfig,
    images: Store,
    world: World,
    *,
    bad_images: BadImages | None = None,
    view: View = centre_crop,
) -> Pipeline:
    """This rank's share of the validation images, each once, with the last batch padded."""
    feed = ValidationFeed(
        images,
        batch=cfg.batch,
        rank=world.rank,
        world_size=world.size,
        bad_images=bad_images,
        view=view,
    )
    return _pipeline(cfg, feed, world)


def _pipeline(cfg: TrainConfig, feed: Feed, world: World) -> Pipeline:
    return make_pipeline(
        cfg.pipeline,
        feed,
        image_size=cfg.image_size,
        device_id=world.device.index if world.device.type == "cuda" else None,
        num_threads=cfg.decode_threads or world.threads,
    )
