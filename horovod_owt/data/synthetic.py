"""A small data set of real JPEGs in ImageNet's layout, for quickstarts, tests and benchmarks.

A class is a pattern: stripes, dots, bricks and so on. Everything else about an image is drawn independently
of its class: the colours and the area that each covers, scale, phase, a small rotation, light, noise, size
and JPEG quality. So colours carry no information about the class, and neither a flip nor a random crop
changes it.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from horovod_owt.data.listing import images_below
from horovod_owt.data.store import SPLITS, first_few
from horovod_owt.data.workers import in_processes, usable_cores
from horovod_owt.errors import DataError
from horovod_owt.files import atomic_folder, real_path

NOTE = "synthetic.json"  # what it was made from; written last
CHUNK = 25  # images a worker draws before it reports back


# Each pattern is a height over a plane tiled with unit cells; an image is painted where the height exceeds a
# quantile. `x` and `y` count cells; `a` and `b` run from -0.5 to 0.5 within one.
def _within_cell(x):
    return x - np.floor(x) - 0.5


def _horizontal_stripes(x, y):
    return np.abs(_within_cell(y))


def _vertical_stripes(x, y):
    return np.abs(_within_cell(x))


def _diagonal_stripes(x, y):
    return np.abs(_within_cell((x + y) * np.float32(0.7)))


def _checkerboard(x, y):
    dark = np.maximum(np.abs(_within_cell(x)), np.abs(_within_cell(y)))
    also_dark = np.maximum(np.abs(_within_cell(x + 0.5)), np.abs(_within_cell(y + 0.5)))
    return -np.minimum(dark, also_dark)


def _dots(x, y):
    a, b = _within_cell(x), _within_cell(y)
    return -(a * a + b * b)


def _rings(x, y):
    a, b = _within_cell(x), _within_cell(y)
    return -np.abs(np.sqrt(a * a + b * b) - 0.33)


def _triangles(x, y):
    a, b = _within_cell(x), _within_cell(y) - 0.12
    return -np.maximum(b, np.abs(a) * 0.866 - b * 0.5)


def _crosses(x, y):
    a, b = np.abs(_within_cell(x)), np.abs(_within_cell(y))
    return -np.minimum(np.maximum(2.2 * a, b), np.maximum(a, 2.2 * b))


def _bricks(x, y):
    row = np.floor(y)
    a, b = _within_cell(x / 2 + row / 2), _within_cell(y)
    return np.maximum(2 * np.abs(a) - 0.5, np.abs(b))


def _zigzag(x, y):
    return np.abs(_within_cell(y + 1.5 * np.abs(_within_cell(x / 2))))


PATTERNS: dict[str, Callable] = {
    "horizontal": _horizontal_stripes,
    "vertical": _vertical_stripes,
    "diagonal": _diagonal_stripes,
    "checkerboard": _checkerboard,
    "dots": _dots,
    "rings": _rings,
    "triangles": _triangles,
    "crosses": _crosses,
    "bricks": _bricks,
    "zigzag": _zigzag,
}


def class_patterns(label: int, classes: int) -> list[str]:
    """The patterns layered in one class, coarsest first: the decimal digits of its number."""
    digits = len(str(classes - 1))
    names = list(PATTERNS)
    return [names[int(digit)] for digit in f"{label:0{digits}d}"]


def class_name(label: int, classes: int) -> str:
    """A synset-like folder name that sorts in class order, such as n00000003_checkerboard."""
    return f"n{label:08d}_{'-'.join(class_patterns(label, classes))}"


@dataclass(frozen=True)
class SyntheticSet:
    """What the bytes of a synthetic data set depend on, besides the versions of NumPy and Pillow."""

    classes: int = 10
    train_per_class: int = 200
    val_per_class: int = 50
    seed: int = 0
    size: tuple[int, int] = (160, 360)  # shortest and longest short side, pixels

    def check(self) -> None:
        counts = (self.classes, self.train_per_class, self.val_per_class)
        if min(counts) < 1 or self.classes > 10**6:
            raise DataError(
                f"{self.classes} classes with {self.train_per_class} + {self.val_per_class} images each",
                wanted="at least one of each, and at most a million classes",
            )
        if not 16 <= self.size[0] <= self.size[1] <= 4096:
            raise DataError(
                f"short sides from {self.size[0]} to {self.size[1]}", wanted="16 <= min <= max <= 4096"
            )
        if self.seed < 0:
            raise DataError(f"seed {self.seed}", wanted="seed >= 0")

    @property
    def num_images(self) -> int:
        return self.classes * (self.train_per_class + self.val_per_class)

    def chunks(self) -> Iterator[tuple[str, int, range]]:
        """Tasks: (split, label, image numbers)."""
        for split, count in zip(SPLITS, (self.train_per_class, self.val_per_class), strict=True):
            for label in range(self.classes):
                for start in range(0, count, CHUNK):
                    yield split, label, range(start, min(start + CHUNK, count))


def draw(spec: SyntheticSet, split: str, label: int, number: int) -> bytes:
    """One JPEG: a pure function of its arguments."""
    rng = np.random.default_rng([spec.seed, SPLITS.index(split), label, number])
    short = int(rng.integers(spec.size[0], spec.size[1] + 1))
    long = int(short * rng.uniform(1.0, 1.6))
    height, width = (short, long) if rng.random() < 0.7 else (long, short)  # ImageNet: mostly landscape

    pixels = _paint(class_patterns(label, spec.classes), height, width, rng)
    image = Image.fromarray(pixels)
    if rng.random() < 0.03:
        image = image.convert("L")
    quality, progressive = int(rng.integers(75, 96)), bool(rng.random() < 0.1)
    # 2 is 4:2:0, 0 is 4:4:4; Pillow's buffer for a progressive image may be too small for 4:4:4
    subsampling = 2 if progressive else int(rng.choice([0, 2]))
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=quality, subsampling=subsampling, progressive=progressive)
    return jpeg.getvalue()


def _paint(patterns: list[str], height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A background and one layer for each pattern, under uneven light: (height, width, 3) bytes."""
    y, x = np.ogrid[0:height, 0:width]
    x, y = x.astype(np.float32), y.astype(np.float32)
    angle = np.radians(rng.uniform(-10, 10))
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    x, y = cos * x + sin * y, cos * y - sin * x  # rotated a little

    period = min(height, width) / rng.uniform(4.5, 7.0)
    background, *colours = _colours(1 + len(patterns), rng)
    image = np.empty((height, width, 3), np.float32)
    image[:] = background
    for pattern, colour in zip(patterns, colours, strict=True):
        phase_x, phase_y = rng.uniform(0, 100, 2).astype(np.float32)
        scale = np.float32(1 / period)
        cells = PATTERNS[pattern](x * scale + phase_x, y * scale + phase_y)
        coverage = rng.uniform(0.36, 0.46)  # of the area, for all patterns: histograms must not differ
        painted = cells > float(np.quantile(cells[::3, ::3], 1 - coverage))
        image[painted] = image[painted] * 0.3 + colour * 0.7 if len(patterns) > 1 else colour
        period /= 3  # the next layer is finer, so that the order of the digits is visible

    slope_x, slope_y = rng.uniform(-0.25, 0.25, 2) / (width, height)
    light = 1 + np.float32(slope_x) * (x - width / 2) + np.float32(slope_y) * (y - height / 2)
    noise = rng.standard_normal((height, width), np.float32) * np.float32(rng.uniform(2, 8))
    image *= light[..., None]
    image += noise[..., None]
    return np.clip(image, 0, 255, out=image).astype(np.uint8)


def _colours(count: int, rng: np.random.Generator, contrast: float = 70) -> list[np.ndarray]:
    """Random colours; consecutive ones differ in brightness by at least `contrast` of 255."""
    colours: list[np.ndarray] = []
    while len(colours) < count:
        colour = rng.uniform(20, 235, 3).astype(np.float32)
        if not colours or abs(_brightness(colour) - _brightness(colours[-1])) >= contrast:
            colours.append(colour)
    return colours


def _brightness(rgb: np.ndarray) -> float:
    return float(rgb @ np.array([0.299, 0.587, 0.114]))


def write_synthetic(
    out: Path,
    *,
    classes: int = 10,
    train_per_class: int = 200,
    val_per_class: int = 50,
    seed: int = 0,
    size: tuple[int, int] = (160, 360),
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> bool:
    """Write a synthetic image folder to `out`; False if the same one exists already.

    `out` is written atomically. `progress(done, total)` counts images.
    """
    spec = SyntheticSet(classes, train_per_class, val_per_class, seed, tuple(size))
    spec.check()
    out = real_path(out)
    if _is_there_already(out, spec):
        return False
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(out, last=NOTE) as scratch:
            for split in SPLITS:
                for label in range(classes):
                    (scratch / split / class_name(label, classes)).mkdir(parents=True)
            done = 0
            for written in _write_chunks(scratch, spec, workers or usable_cores()):
                done += written
                if progress:
                    progress(done, spec.num_images)
            (scratch / NOTE).write_text(json.dumps(asdict(spec), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        saw = f"cannot write {out}: {error.strerror or error}"
        raise DataError(saw, fix="choose a writable folder on a disk with room") from error
    return True


def _is_there_already(out: Path, spec: SyntheticSet) -> bool:
    if not out.exists():
        return False
    if not out.is_dir():
        raise DataError(f"{out} is a file", wanted="a new or empty folder", fix="choose another name")
    found = sorted(entry.name for entry in out.iterdir())
    if not found:
        return False
    if NOTE in found:
        have = _read_note(out / NOTE)
        want = json.loads(json.dumps(asdict(spec)))  # tuples become lists
        if have == want:
            _check_complete(out, spec)
            return True
        differ = ", ".join(f"{key} {have.get(key)}" for key in want if have.get(key) != want[key])
        saw = f"{out} contains another synthetic data set ({differ})"
    else:
        saw = f"{out} is not empty: it contains {first_few(found)}"
    raise DataError(saw, wanted="a new or empty folder", fix="choose another name, or remove it")


def _check_complete(out: Path, spec: SyntheticSet) -> None:
    """Raise DataError if images are gone: hosts clean /tmp by age, and a note that is read stays young."""
    left = sum(images_below(os.fsencode(out / split)) for split in SPLITS)
    if left < spec.num_images:
        saw = f"{out} has {left} of its {spec.num_images} images"
        raise DataError(saw, wanted="all of them", fix="remove it: the same command draws them again")


def _read_note(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise DataError(f"unreadable {path}", fix="choose another name, or remove the folder") from None


def _write_chunks(root: Path, spec: SyntheticSet, workers: int) -> Iterator[int]:
    """Write every image under `root`; yields the number written after each task."""
    tasks = [(root, spec, *chunk) for chunk in spec.chunks()]
    yield from in_processes(_write_chunk, tasks, workers)


def _write_chunk(task: tuple[Path, SyntheticSet, str, int, range]) -> int:
    root, spec, split, label, numbers = task
    synset = f"n{label:08d}"
    folder = root / split / class_name(label, spec.classes)
    for number in numbers:
        (folder / f"{synset}_{number:05d}.JPEG").write_bytes(draw(spec, split, label, number))
    return len(numbers)
