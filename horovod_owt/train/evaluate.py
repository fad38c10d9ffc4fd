"""Validation that counts each image exactly once, on any number of ranks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from horovod_owt.data.batch import Batch
from horovod_owt.parallel.collectives import sum_over_ranks
from horovod_owt.train.replica import Replica


@dataclass(frozen=True)
class Score:
    """Exact counts over all good images of the validation set, and the mean loss."""

    images: int
    correct_top1: int
    correct_top5: int
    loss: float
    bad_images: int = 0  # skipped
    class_images: tuple[int, ...] = ()  # by label
    class_correct: tuple[int, ...] = ()  # in top 1
    averaged: Score | None = None  # of the averaged weights, on the same images

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * self.correct_top1 / max(self.images, 1)

    @property
    def top5(self) -> float:
        """Percent."""
        return 100 * self.correct_top5 / max(self.images, 1)

    def class_top1(self) -> list[float]:
        """Percent, by label; NaN for a class without images."""
        counts = zip(self.class_correct, self.class_images, strict=True)
        return [100 * correct / images if images else math.nan for correct, images in counts]

    def __str__(self) -> str:
        top1 = f"top-1 {self.top1:.2f} % ({self.correct_top1} of {self.images})"
        left_out = f" | {self.bad_images} bad images skipped" if self.bad_images else ""
        average = f" | averaged weights: top-1 {self.averaged.top1:.2f} %" if self.averaged else ""
        return f"{top1} | top-5 {self.top5:.2f} % | loss {self.loss:.3f}{average}{left_out}"

    def to_dict(self) -> dict[str, int | float]:
        of_average = ("top1", "top5", "loss") if self.averaged else ()
        return {
            "images": self.images,
            "correct_top1": self.correct_top1,
            "correct_top5": self.correct_top5,
            "top1": self.top1,
            "top5": self.top5,
            "loss": self.loss,
            "bad_images": self.bad_images,
            **{f"averaged_{key}": getattr(self.averaged, key) for key in of_average},
        }


def validate(
    replica: Replica, batches: Iterable[Batch], *, stop_asked: Callable[[], bool] = lambda: False
) -> Score | None:
    """Validate on this rank's slice of the validation set and sum over ranks; every rank must call it.

    The averaged weights, if there are any, are validated on the same images. Returns None on every rank if
    any rank was asked to stop meanwhile. The last batch of a slice is padded; padding and bad images are not
    counted. Sums are float64, hence exact for the counts.
    """
    bad_and_stopped = torch.zeros(2, dtype=torch.float64)
    with replica.evaluating() as logits_of:
        averaged = replica.averaged_model()
        models = [logits_of] if averaged is None else [logits_of, averaged]
        counts = torch.zeros(len(models), 4 + 2 * replica.cfg.classes, dtype=torch.float64)
        for batch in batches:
            if stop_asked():
                bad_and_stopped[1] = 1
                break
            counts += torch.stack([_count(model(batch.images), batch) for model in models]).cpu()
            bad_and_stopped[0] += len(batch.faults)
    totals = sum_over_ranks(torch.cat([bad_and_stopped, counts.flatten()]), "validation")
    bad, stopped = totals[:2].tolist()
    if stopped:
        return None
    own, *averages = (_score(row.tolist(), int(bad)) for row in totals[2:].view_as(counts))
    return dataclasses.replace(own, averaged=averages[0] if averages else None)


def _score(totals: list[float], bad_images: int) -> Score:
    """The score, from the sums of `_count` over all images."""
    images, top1, top5, loss, *of_classes = totals
    of_classes = tuple(map(int, of_classes))
    classes = len(of_classes) // 2
    return Score(
        images=int(images),
        correct_top1=int(top1),
        correct_top5=int(top5),
        loss=loss / max(images, 1),
        bad_images=bad_images,
        class_images=of_classes[:classes],
        class_correct=of_classes[classes:],
    )


def places(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Position (b,) of each label in the descending order of its row's scores (b, classes), from 0.

    Ties, frequent in 16-bit precision, are broken by class index, as in a stable sort. A NaN score comes
    last. The result for a negative label is arbitrary.
    """
    labels = labels[:, None].clamp(min=0)
    own = scores.gather(1, labels)
    before = torch.arange(scores.shape[1], device=scores.device) < labels
    place = ((scores > own) | ((scores == own) & before)).sum(dim=1)
    return place.masked_fill(own[:, 0].isnan(), scores.shape[1])


def _count(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Counts over the valid images, (4 + 2 * classes,) float64.

    Images, correct in top 1, correct in top 5, sum of losses; then per class images and correct in top 1.
    """
    valid = batch.valid.double()
    losses = F.cross_entropy(logits, batch.labels, reduction="none").double()  # 0 for a negative label
    place = places(logits, batch.labels)
    of_class = (batch.labels[:, None] == torch.arange(logits.shape[1], device=logits.device)).double()
    totals = torch.stack(
        [
            valid.sum(),
            ((place < 1) * valid).sum(),
            ((place < 5) * valid).sum(),
            torch.where(batch.valid, losses, torch.zeros_like(losses)).sum(),
        ]
    )
    return torch.cat([totals, valid @ of_class, ((place < 1) * valid) @ of_class])
