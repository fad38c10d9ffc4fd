"""The contenders of `bench input`: our pipeline and the usual alternatives. All of them prefetch.

Each yields normalised float32 batches as torch tensors, from the same files, cores, crops and sizes.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

from horovod_owt.config import TrainConfig
from horovod_owt.data.arrays import Names
from horovod_owt.data.augment import RATIO, training_windows
from horovod_owt.data.batch import MEAN, STD
from horovod_owt.data.cache import cached
from horovod_owt.data.feed import TrainFeed
from horovod_owt.data.order import SampleOrder
from horovod_owt.data.pipeline import make_pipeline
from horovod_owt.data.store import DataSet, Store, open_data_set

ENDLESS = 2**40  # samples
CACHED = 1024  # images in the cache: more than fit a CPU's caches
SPDL_AHEAD = 3  # batches


def open_ours(cfg: TrainConfig, store: Store, device: torch.device, keep: ExitStack) -> Iterator[Tensor]:
    """The training pipeline: our sample order and augmentation, decoded by `cfg.pipeline`."""
    feed = TrainFeed(store, seed=cfg.seed, batch=cfg.batch, scale=(cfg.crop_scale_min, 1.0))
    pipeline = make_pipeline(
        cfg.pipeline,
        feed,
        image_size=cfg.image_size,
        device_id=device.index if device.type == "cuda" else None,
        num_threads=cfg.decode_threads,
    )
    return (batch.images for batch in keep.enter_context(pipeline))


def open_cached(
    cfg: TrainConfig, store: Store, device: torch.device, keep: ExitStack
) -> Iterator[Tensor] | None:
    """The training pipeline with all images cached, as from the second epoch on; None where there is no room.

    On CACHED images of the store; `cfg` says where and how they are cached, by default cache=ram.
    """
    cfg = dataclasses.replace(cfg, cache="ram") if cfg.cache == "none" else cfg
    some = _Some(store, CACHED)
    data = keep.enter_context(cached(DataSet(some, some), cfg.cache, cfg.cached_side()))
    if data.train is some:
        return None
    fill = data.train.pixels if cfg.cached_side() else data.train.read
    with ThreadPoolExecutor(cfg.decode_threads) as pool:
        list(pool.map(fill, range(len(some))))
    return open_ours(cfg, data.train, device, keep)


class _Some:
    """The first images of a store in a shuffled order, as a store."""

    def __init__(self, store: Store, count: int) -> None:
        _, self._indices = SampleOrder(len(store), 0).at(0, min(count, len(store)))
        self._store, self.classes, self.labels = store, store.classes, store.labels[self._indices]
        self.names = Names.joined(map(store.name, self._indices.tolist()))

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> bytes:
        return self._store.read(self._indices[index])

    def stamp(self, index: int) -> int:
        return self._store.stamp(self._indices[index])

    def path(self, index: int) -> str:
        return self._store.path(self._indices[index])


def open_spdl(
    cfg: TrainConfig, store: Store, device: torch.device, keep: ExitStack
) -> Iterator[Tensor] | None:
    """SPDL's FFmpeg-based functions in threads; None if SPDL or FFmpeg is missing."""
    try:
        from spdl import io as spdl

        spdl.utils.get_ffmpeg_versions()
    except (ImportError, RuntimeError):
        return None
    pool = keep.enter_context(ThreadPoolExecutor(cfg.decode_threads, thread_name_prefix="spdl"))
    keep.callback(pool.shutdown, wait=False, cancel_futures=True)
    order, side = SampleOrder(len(store), cfg.seed), cfg.image_size
    mean, std = (255 * torch.tensor(each, device=device).view(3, 1, 1) for each in (MEAN, STD))

    def decode(epoch: int, index: int) -> Tensor:
        packets = spdl.demux_image(store.read(index))
        size, where = np.array([[packets.height, packets.width]]), np.array([[epoch], [index]])
        windows, flips = training_windows(size, cfg.seed, *where, scale=(cfg.crop_scale_min, 1.0))
        top, left, height, width = windows[0].tolist()
        steps = [f"crop={width}:{height}:{left}:{top}", f"scale={side}:{side}:flags=bilinear"]
        steps += ["hflip"] * bool(flips[0]) + ["format=pix_fmts=rgb24"]
        frames = spdl.decode_packets(packets, filter_desc=",".join(steps))
        return torch.from_numpy(spdl.to_numpy(spdl.convert_frames(frames)))

    def batches() -> Iterator[Tensor]:
        ahead: deque[list[Future[Tensor]]] = deque()
        for position in itertools.count(0, cfg.batch):
            samples = zip(*(each.tolist() for each in order.at(position, cfg.batch)), strict=True)
            ahead.append([pool.submit(decode, *sample) for sample in samples])
            if len(ahead) > SPDL_AHEAD:
                pixels = torch.stack([image.result() for image in ahead.popleft()]).permute(0, 3, 1, 2)
                yield pixels.to(device, non_blocking=True).float().sub_(mean).div_(std)

    return batches()


def open_data_loader(cfg: TrainConfig, store: Store, device: torch.device) -> Iterator[Tensor]:
    """torch's DataLoader with torchvision's transforms, one worker per decoding thread of the others."""
    seen = transforms.Compose(
        [
            transforms.RandomResizedCrop(cfg.image_size, scale=(cfg.crop_scale_min, 1.0), ratio=RATIO),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    images = _Images(store, seen)
    loader = DataLoader(
        images,
        batch_size=cfg.batch,
        sampler=RandomSampler(images, replacement=True, num_samples=ENDLESS),
        num_workers=cfg.decode_threads,
        pin_memory=device.type == "cuda",
    )
    return (batch.to(device, non_blocking=True) for batch in loader)


class _Images(Dataset):
    """torchvision's ImageFolder, reading from a store."""

    def __init__(self, store: Store, transform: Callable[[Image.Image], Tensor]) -> None:
        self._store, self._transform = store, transform

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(io.BytesIO(self._store.read(index))) as image:
            return self._transform(image.convert("RGB"))


def open_dali_reader(cfg: TrainConfig, folder: Path, device: torch.device) -> Iterator[Tensor]:
    """DALI with its own file reader, shuffle and random crops, as in its ResNet example."""
    from nvidia.dali import Pipeline, fn, types
    from nvidia.dali.plugin.pytorch import feed_ndarray

    from horovod_owt.data.dali_decoder import decoder_options

    on_gpu = device.type == "cuda"
    pipe = Pipeline(cfg.batch, cfg.decode_threads, device.index if on_gpu else None, seed=cfg.seed)
    with pipe:
        jpegs, _ = fn.readers.file(file_root=str(folder), random_shuffle=True, name="reader")
        images = fn.decoders.image_random_crop(
            jpegs,
            random_area=[cfg.crop_scale_min, 1.0],
            random_aspect_ratio=list(RATIO),
            **decoder_options(on_gpu=on_gpu),
        )
        images = fn.resize(images, size=[cfg.image_size] * 2, interp_type=types.INTERP_LINEAR, antialias=True)
        images = fn.crop_mirror_normalize(
            images,
            mirror=fn.random.coin_flip(),
            dtype=types.FLOAT,
            output_layout="HWC",
            mean=[255 * mean for mean in MEAN],
            std=[255 * std for std in STD],
        )
        pipe.set_outputs(images)
    pipe.build()
    pipe.schedule_run()
    while True:
        (decoded,) = pipe.share_outputs()
        tensor = decoded.as_tensor()
        own = torch.empty(tensor.shape(), dtype=torch.float32, device=device)
        feed_ndarray(tensor, own, cuda_stream=torch.cuda.current_stream(device) if on_gpu else None)
        pipe.release_outputs()
        pipe.schedule_run()
        yield own


def open_decoder(cfg: TrainConfig, root: Path, threads: int, keep: ExitStack) -> Iterator[int]:
    """Nothing but decoding of a folder's JPEGs, to whole RGB images on the CPU; yields each batch's number.

    By DALI, or by Pillow in threads where `cfg.pipeline` is torchvision or images are in shards.
    """
    threads = cfg.decode_threads or threads
    if cfg.pipeline == "dali" and not any((root / "train").glob("*.tar")):
        return _decode_by_dali(cfg, root / "train", threads)
    return _decode_by_pillow(cfg, open_data_set(root).train, threads, keep)


def _decode_by_dali(cfg: TrainConfig, folder: Path, threads: int) -> Iterator[int]:
    from nvidia.dali import Pipeline, fn

    from horovod_owt.data.dali_decoder import decoder_options

    pipe = Pipeline(cfg.batch, threads, None, seed=cfg.seed)
    with pipe:
        jpegs, _ = fn.readers.file(file_root=str(folder), random_shuffle=True, name="reader")
        pipe.set_outputs(fn.decoders.image(jpegs, **decoder_options(on_gpu=False)))
    pipe.build()
    while True:
        (images,) = pipe.run()
        yield len(images)


def _decode_by_pillow(cfg: TrainConfig, store: Store, threads: int, keep: ExitStack) -> Iterator[int]:
    pool = keep.enter_context(ThreadPoolExecutor(threads))

    def decode(index: int) -> None:
        with Image.open(io.BytesIO(store.read(index % len(store)))) as image:
            image.convert("RGB")

    for start in itertools.count(0, cfg.batch):
        yield len(list(pool.map(decode, range(start, start + cfg.batch))))
