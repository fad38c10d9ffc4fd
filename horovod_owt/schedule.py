"""The learning rate as a pure function of the epoch."""

from __future__ import annotations

import math
from collections.abc import Callable

from horovod_owt.errors import ConfigError

Factor = Callable[[float, float], float]  # (epoch, epochs) -> share of the peak learning rate

FORMS = "constant, cosine, poly:POWER or step:EPOCHS:FACTOR"


def parse_schedule(text: str) -> Factor:
    """The function that a schedule such as `step:30:0.1` or `poly:2` names; raises ConfigError."""
    kind, *words = text.split(":")
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if kind == "constant" and not words:
        return lambda epoch, epochs: 1.0
    if kind == "cosine" and not words:
        return lambda epoch, epochs: 0.5 * (1 + math.cos(math.pi * min(epoch / epochs, 1)))
    if kind == "poly" and len(numbers) == 1 and numbers[0] > 0:
        return lambda epoch, epochs: max(0.0, 1 - epoch / epochs) ** numbers[0]
    if kind == "step" and len(numbers) == 2 and numbers[0] > 0 and numbers[1] > 0:
        return lambda epoch, epochs: numbers[1] ** math.floor(epoch / numbers[0])
    raise ConfigError(f"schedule={text}", wanted=FORMS, fix="schedule=step:30:0.1")


def learning_rate(
    schedule: str, *, peak_lr: float, epoch: float, epochs: float, warmup_epochs: float, step_epochs: float
) -> float:
    """Learning rate of the step that starts at `epoch` (a fraction) and is `step_epochs` long.

    The warm-up ramp uses the step's end, so that the first rate is not 0 and the ramp ends at the peak.
    """
    lr = peak_lr * parse_schedule(schedule)(epoch, epochs)
    if epoch < warmup_epochs:
        lr *= min(1.0, (epoch + step_epochs) / warmup_epochs)
    return lr
