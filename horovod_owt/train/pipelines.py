"""One rank's batches: from the endless training stream, and from its slice of the validation set."""

from __future__ import annotations

from collections.abc import Callable

from horovod_owt.config import TrainConfig
from horovod_owt.data.augment import View, centre_crop
from horovod_owt.data.batch import Batch, Pipeline
from horovod_owt.data.faults import BadImages
from horovod_owt.data.feed import Feed, TrainFeed, ValidationFeed
from horovod_owt.data.pipeline import make_pipeline
from horovod_owt.data.store import DataSet, Store
from horovod_owt.parallel.runtime import World
from horovod_owt.schedule import image_size


def training_pipeline(
    cfg: TrainConfig,
    folder: DataSet,
    world: World,
    *,
    position: int = 0,
    bad_images: BadImages | None = None,
) -> Pipeline:
    """Endless micro-batches, starting at `position` (samples consumed by all ranks so far).

    Without `bad_images`, a bad image raises RunError.
    """

    def open_at(position: int, side: int) -> Pipeline:
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
        return _pipeline(cfg, feed, world, side)

    if not cfg.image_sizes:
        return open_at(position, cfg.image_size)
    return GrowingImages(cfg, open_at, position, num_samples=len(folder.train), world_size=world.size)


class GrowingImages:
    """Training batches whose image size follows cfg.image_sizes, by the epoch in which their step begins.

    The size depends only on the number of samples consumed, so a resumed run uses the same.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        open_at: Callable[[int, int], Pipeline],
        position: int,
        *,
        num_samples: int,
        world_size: int,
    ) -> None:
        """`open_at` makes a pipeline that starts at a position, with an image size."""
        self._cfg, self._open_at, self._num_samples = cfg, open_at, num_samples
        self._global_batch = cfg.global_batch(world_size)
        self._position, self._micro_step = position, 0
        self._side = self._wanted_side()
        self._batches = open_at(position, self._side)

    def __iter__(self) -> GrowingImages:
        return self

    def __next__(self) -> Batch:
        if self._micro_step == 0 and (side := self._wanted_side()) != self._side:
            self._batches.close()
            self._side, self._batches = side, self._open_at(self._position, side)
        batch = next(self._batches)
        self._micro_step = (self._micro_step + 1) % self._cfg.accum_steps
        if self._micro_step == 0:
            self._position += self._global_batch
        return batch

    def close(self) -> None:
        self._batches.close()

    def __enter__(self) -> GrowingImages:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def _wanted_side(self) -> int:
        epoch = self._position / self._num_samples
        return image_size(self._cfg.image_sizes, epoch=epoch, otherwise=self._cfg.image_size)


def validation_pipeline(
    cfg: TrainConfig,
    images: Store,
    world: World,
    *,
    bad_images: BadImages | None = None,
    view: View = centre_crop,
) -> Pipeline:
    """This rank's share of the validation images, each once; the last batch is padded.

    Without `bad_images`, a bad image raises RunError.
    """
    feed = ValidationFeed(
        images,
        batch=cfg.batch,
        rank=world.rank,
        world_size=world.size,
        bad_images=bad_images,
        view=view,
    )
    return _pipeline(cfg, feed, world, cfg.image_size)


def _pipeline(cfg: TrainConfig, feed: Feed, world: World, side: int) -> Pipeline:
    return make_pipeline(
        cfg.pipeline,
        feed,
        image_size=side,
        device_id=world.device.index if world.device.type == "cuda" else None,
        num_threads=cfg.decode_threads or world.threads,
    )
