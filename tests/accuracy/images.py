"""The data sets: real digits that scikit-learn ships, and the synthetic set, with many images or few."""

from pathlib import Path

import numpy as np
from PIL import Image

from horovod_owt.data.synthetic import write_synthetic
from horovod_owt.files import atomic_folder

SIDE = 64  # px; the digits are 8 x 8, enlarged
VALIDATION = 5  # every fifth image of a class


def make(name: str, root: Path) -> Path:
    """The data set's folder, made on first use."""
    folder = root / name
    if not folder.exists():
        {"digits": _digits, "synthetic": _synthetic, "synthetic-hard": _hard}[name](folder)
    return folder


def _digits(folder: Path) -> None:
    """1,797 handwritten digits (Alpaydin and Kaynak 1998, UCI), as JPEGs in ImageNet's layout."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    folder.parent.mkdir(parents=True, exist_ok=True)
    seen = np.zeros(10, int)
    with atomic_folder(folder) as scratch:
        for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            split = "val" if seen[label] % VALIDATION == 0 else "train"
            seen[label] += 1
            image = Image.fromarray(np.clip(pixels * 16, 0, 255).astype(np.uint8))
            place = scratch / split / f"digit{label}"
            place.mkdir(parents=True, exist_ok=True)
            image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB").save(
                place / f"{number:04d}.JPEG", quality=92
            )


def _synthetic(folder: Path) -> None:
    write_synthetic(folder, classes=10, train_per_class=120, val_per_class=40, size=(72, 96))


def _hard(folder: Path) -> None:
    """A third of the images: a net that learns them by heart does worse on the others."""
    write_synthetic(folder, classes=10, train_per_class=40, val_per_class=40, size=(72, 96))
