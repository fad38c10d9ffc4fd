"""Expected waiting for the slowest rank, from the variation of one rank's step time."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from statistics import NormalDist

from horovod_owt.config import TrainConfig
from horovod_owt.perf.predict import Parts, StepTime

EXCHANGES = 5  # of a classifier pass: features, units and logits forward, units and features back

Stretch = tuple[float, int, int]  # seconds of work, ranks that synchronise after it, how often


def waiting_s(time: StepTime, parts: Parts, cfg: TrainConfig, ranks: int, jitter: float) -> float:
    """Expected seconds of a step that the ranks wait for each other.

    `jitter` is the standard deviation of one rank's step time, as a share of it. Disturbances are assumed to
    be short and independent, so that their variance grows with time: t seconds of a step of T have a
    deviation of jitter sqrt(t T). Ranks that synchronise within a step, as in an fc_group, therefore wait
    longer in total than ranks that synchronise once.
    """
    return sum(
        often * jitter * sqrt(seconds * time.total_s) * slowest_of(together)
        for seconds, together, often in _stretches(time, parts, cfg, ranks)
    )


def slowest_of(ranks: int) -> float:
    """The expected maximum of that many standard normal variables, by Blom's formula (1958)."""
    return NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25)) if ranks > 1 else 0.0


def _stretches(time: StepTime, parts: Parts, cfg: TrainConfig, ranks: int) -> Iterator[Stretch]:
    """A step's stretches of work between synchronisations; their seconds add up to the step."""
    group, left_s = cfg.ranks_per_classifier(), time.total_s
    if group > 1:
        turns = group if cfg.owt_scheme == "b" else 1
        between, micro_batches = turns * (EXCHANGES - 1), cfg.accum_steps
        inside = [
            (parts.conv_forward_s, group, 1),
            (parts.conv_backward_s + parts.conv_forward_s, group, micro_batches - 1),  # of the one before
            (parts.classifier_s / between, group, between * micro_batches),
        ]
        yield from inside
        left_s -= sum(seconds * often for seconds, _, often in inside)
    yield left_s, ranks, 1
