"""The results of `owt evaluate` on a run's page: the most confused pairs and the worst classes."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from horovod_owt.errors import ConfigError, OwtError
from horovod_owt.files import read_user_json
from horovod_owt.report.timeline import list_of
from horovod_owt.runs.folder import evaluation_file

MAX_PAIRS = 12
MAX_CLASSES = 10
SIDE = 96  # px of a thumbnail, shown in 64
QUALITY = 78
WANTED = "the output of `owt evaluate --json`"


def evaluation_of(run_dir: Path, file: Path | None) -> dict[str, Any] | None:
    """The evaluation in `file`, by default the one in the run folder; None if that has none.

    Raises ConfigError if the file contains something else.
    """
    path = file or evaluation_file(run_dir)
    if file is None and not path.exists():
        return None
    document = _read(path)
    classes = {str(row.get("class")): row for row in list_of(document["per_class"]) if isinstance(row, dict)}
    pairs = [pair for pair in list_of(document.get("confused")) if isinstance(pair, dict)][:MAX_PAIRS]
    confused = [_pair(pair, classes) for pair in pairs]
    wrong = [row for row in map(_class, classes.values()) if row and row["share"] < 1]
    found = {
        **{key: document.get(key) for key in ("images", "correct_top1", "correct_top5", "top1", "top5")},
        **{key: document.get(key) for key in ("loss", "crops", "checkpoint", "step", "data")},
        "confused": confused,
        "worst": sorted(wrong, key=lambda row: row["share"])[:MAX_CLASSES],
    }
    if confused:
        found["no_thumbnails"] = _add_thumbnails(confused, document.get("data"))
    return found


def _read(path: Path) -> dict[str, Any]:
    document = read_user_json(path, wanted=WANTED)
    numbers = ("images", "top1", "top5")
    if (
        not isinstance(document, dict)
        or "per_class" not in document
        or not all(isinstance(document.get(key), (int, float)) for key in numbers)
    ):
        raise ConfigError(f"{path} is not an evaluation", wanted=WANTED)
    return document


def _pair(pair: Mapping[str, Any], classes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    name, images = str(pair.get("class")), pair.get("images")
    images = images if isinstance(images, int) else 0
    of = classes.get(name, {}).get("images")
    share = images / of if isinstance(of, int) and of else None
    return {"class": name, "taken_for": str(pair.get("taken_for")), "images": images, "share": share}


def _class(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """A class's row with its share of correct images; None for a class without images."""
    images, correct = row.get("images"), row.get("correct_top1")
    if not isinstance(images, int) or not isinstance(correct, int) or not images:
        return None
    return {"class": str(row["class"]), "images": images, "correct_top1": correct, "share": correct / images}


def _add_thumbnails(pairs: list[dict[str, Any]], data: Any) -> str:
    """Add a validation image of each class to the pairs. Returns why there are none, or an empty string."""
    try:
        pictures = _Pictures(Path(str(data)))
    except OwtError as error:
        return f"No pictures: {error.saw}"
    except ImportError as error:
        return f"No pictures: {error}"
    for pair in pairs:
        pair["thumbnails"] = [pictures.of(pair["class"]), pictures.of(pair["taken_for"])]
    return ""


class _Pictures:
    """The first good validation image of each class, small, as a data URI."""

    def __init__(self, root: Path) -> None:
        """Raises DataError if the data set is not on this host, ImportError without numpy."""
        from horovod_owt.data.store import open_validation_set

        self._store = open_validation_set(root)
        self._labels = {name: label for label, name in enumerate(self._store.classes)}
        self._made: dict[str, str | None] = {}

    def of(self, name: str) -> str | None:
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def _make(self, name: str) -> str | None:
        if name not in self._labels:
            return None
        for index in (self._store.labels == self._labels[name]).nonzero()[0][:3]:
            try:
                return _thumbnail(self._store.read(int(index)))
            except (OSError, ValueError):  # a bad image; perhaps the next one is good
                continue
        return None


def _thumbnail(data: bytes) -> str:
    from PIL import ImageOps

    from horovod_owt.data.decode import decoded

    square = ImageOps.fit(decoded(data), (SIDE, SIDE))
    jpeg = io.BytesIO()
    square.save(jpeg, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"
