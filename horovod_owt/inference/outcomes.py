"""The outcome of an evaluation for each image, and counts of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from horovod_owt.text import without_terminal_codes

WORST = 10  # classes that the text lists


@dataclass(frozen=True)
class Outcomes:
    """An element for each good image, in the order of the data set."""

    labels: np.ndarray  # (n,) int64
    places: np.ndarray  # (n,) int64: position of the label in the descending order of scores, from 0
    predicted: np.ndarray  # (n,) int64
    losses: np.ndarray  # (n,) float64

    @classmethod
    def of(cls, rows: Iterable[Sequence[float]], labels: np.ndarray) -> Outcomes:
        """From (index, place, predicted, loss) of each image, in any order; `labels` are by index."""
        index, place, predicted, losses = np.array(sorted(rows), np.float64).reshape(-1, 4).T
        whole = (each.astype(np.int64) for each in (index, place, predicted))
        index, place, predicted = whole
        return cls(labels[index], place, predicted, losses)

    def confusion(self, classes: int) -> np.ndarray:
        """Confusion matrix (classes, classes) int64: images by class (row) and predicted class (column)."""
        codes = self.labels * classes + self.predicted
        return np.bincount(codes, minlength=classes * classes).reshape(classes, classes)


def summary(
    outcomes: Outcomes, classes: Sequence[str], names: Sequence[str], confused: int
) -> dict[str, Any]:
    """Counts over all images and by class, and the `confused` most confused pairs.

    `names` are those of the model's outputs, which may be more than the `classes` of the data set.
    """
    n, correct = len(outcomes.labels), outcomes.places < 1
    top1, top5 = int(correct.sum()), int((outcomes.places < 5).sum())
    images = np.bincount(outcomes.labels, minlength=len(classes)).tolist()
    right = np.bincount(outcomes.labels[correct], minlength=len(classes)).tolist()
    rows = zip(classes, images, right, strict=True)
    return {
        "images": n,
        "correct_top1": top1,
        "correct_top5": top5,
        "top1": 100 * top1 / n,
        "top5": 100 * top5 / n,
        "loss": math.fsum(outcomes.losses) / n,
        "per_class": [{"class": name, "images": of, "correct_top1": hits} for name, of, hits in rows],
        "confused": [
            {"class": names[label], "taken_for": names[predicted], "images": count}
            for label, predicted, count in _confused_pairs(outcomes, len(names))[:confused]
        ],
    }


def _confused_pairs(outcomes: Outcomes, classes: int) -> list[tuple[int, int, int]]:
    """(label, predicted, images), most images first."""
    wrong = outcomes.predicted != outcomes.labels
    codes, counts = np.unique(
        outcomes.labels[wrong] * classes + outcomes.predicted[wrong], return_counts=True
    )
    order = np.argsort(-counts, kind="stable")
    return [(*divmod(int(codes[at]), classes), int(counts[at])) for at in order]


def format_report(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [
        f"{report['checkpoint']} on {report['data']}, {crops_text(report['crops'])}",
        f"top-1 {report['top1']:.3f} % ({report['correct_top1']} of {report['images']}) | top-5 "
        f"{report['top5']:.3f} % ({report['correct_top5']}) | loss {report['loss']:.4f}",
    ]
    if report["bad_images"]:
        lines.append(f"{report['bad_images']} bad images not counted")
    rows = [row for row in report["per_class"] if row["correct_top1"] < row["images"]]
    rows.sort(key=lambda row: row["correct_top1"] / row["images"])
    if rows:
        lines.append(
            f"\nworst classes{f' ({WORST} of {len(rows)} with errors)' if len(rows) > WORST else ''}"
        )
    for row in rows[:WORST]:
        share = 100 * row["correct_top1"] / row["images"]
        lines.append(f"  {share:6.2f} %  {row['correct_top1']:5} of {row['images']:<5}  {row['class']}")
    if report["confused"]:
        lines.append("\nmost confused")
    for pair in report["confused"]:
        lines.append(f"  {pair['images']:5}  {pair['class']} classified as {pair['taken_for']}")
    return without_terminal_codes("\n".join(lines))


def crops_text(crops: int) -> str:
    return "centre crop" if crops == 1 else f"mean of {crops} crops"
