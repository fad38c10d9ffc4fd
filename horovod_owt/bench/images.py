"""The images that a benchmark reads: the user's, or synthetic ones of ImageNet's sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from horovod_owt.data.synthetic import write_synthetic
from horovod_owt.filesystem import temporary_folder

SYNTHETIC = {"classes": 10, "train_per_class": 20, "val_per_class": 1, "size": (300, 400)}  # ImageNet's sizes


@contextmanager
def given_or_synthetic(data: Path | None) -> Iterator[Path]:
    """The user's data set, or a temporary synthetic one for each rank."""
    if data is not None:
        yield data
        return
    with temporary_folder("owt-bench-") as folder:
        root = folder / "synthetic"
        write_synthetic(root, **SYNTHETIC, workers=1)
        yield root
