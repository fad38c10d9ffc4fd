"""Learning rate, weight decay and image size as pure functions of the epoch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import yaml

from horovod_owt.errors import ConfigError

Factor = Callable[[float, float], float]  # (epoch, epochs) -> share of the peak learning rate
Table = tuple[tuple[float, ...], ...]  # rows of an epoch and the values from there on

FORMS = "constant, cosine, poly:POWER, step:EPOCHS:FACTOR or a table [[EPOCH, LR, WEIGHT_DECAY], ...]"
MAX_LR = 1e9
IMAGE_SIZES = (63, 8192)  # px; a smaller side leaves no pixel after AlexNet's last pool


def schedule_of(value: Any) -> str | Table:
    """Validate a schedule in one of FORMS; a table may be text or lists. Raises ConfigError."""
    if not is_table(value):
        parse_schedule(str(value))
        return str(value)
    row = "[EPOCH, LR] or [EPOCH, LR, WEIGHT_DECAY] in every row"
    table = table_of("schedule", value, first=1, columns=(2, 3), row=row)
    if len({len(row) for row in table}) > 1:
        raise ConfigError("schedule has rows with and without a weight decay", wanted=row)
    if any(not 0 <= number <= MAX_LR for row in table for number in row[1:]):
        raise ConfigError(
            "schedule has a learning rate or weight decay out of range", wanted=f"0 to {MAX_LR:g}"
        )
    if not any(lr for _, lr, *_ in table):
        raise ConfigError("schedule has no learning rate above 0", wanted=row)
    return table


def is_table(value: Any) -> bool:
    """Whether a value is meant as a table: a list, or text that begins like one."""
    return isinstance(value, (list, tuple)) or (isinstance(value, str) and value.lstrip().startswith("["))


def table_of(key: str, value: Any, *, first: int, columns: tuple[int, ...], row: str) -> Table:
    """The rows of a table whose first epoch is `first`; `row` describes a row. Raises ConfigError."""
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            value = None
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{key} is not a list of rows", wanted=row)
    rows = tuple(_numbers(key, each, columns, row) for each in value)
    epochs = [int(epoch) for epoch, *_ in rows]
    if not rows or epochs[0] != first:
        raise ConfigError(
            f"{key} starts at epoch {epochs[0]}" if rows else f"{key} is empty",
            wanted=f"a first row for epoch {first}",
            fix=f"{key}=[[{first}, ...], ...]",
        )
    for before, epoch in zip(epochs, epochs[1:], strict=False):
        if epoch <= before:
            raise ConfigError(
                f"{key} goes from epoch {before} to epoch {epoch}",
                wanted="each row for a later epoch than the one before",
                fix="sort the rows by epoch, one for each",
            )
    return tuple((epoch, *values) for epoch, (_, *values) in zip(epochs, rows, strict=True))


def _numbers(key: str, row: Any, columns: tuple[int, ...], wanted: str) -> tuple[float, ...]:
    try:
        if isinstance(row, str) or len(row) not in columns or any(isinstance(each, bool) for each in row):
            raise ValueError
        numbers = tuple(float(each) for each in row)  # from text too: YAML reads 5e-4 as a string
        if not all(map(math.isfinite, numbers)) or numbers[0] != int(numbers[0]):
            raise ValueError
    except (TypeError, ValueError, OverflowError, KeyError):
        raise ConfigError(f"{key} has the row {str(row)[:40]}", wanted=wanted) from None
    return numbers


def row_at(table: Table, epoch: float, *, first: int = 1) -> int:
    """Index of the row for a step that starts after `epoch` epochs; `first` is the table's first epoch."""
    return max(number for number, (start, *_) in enumerate(table) if start - first <= epoch)


def new_row(table: Table, began: float, ended: float) -> bool:
    """Whether a step from epoch `began` to `ended` is the last one of its row."""
    return row_at(table, began) != row_at(table, ended)


def parse_schedule(schedule: str | Table) -> Factor:
    """The schedule's function, for `step:30:0.1`, `poly:2` or a table; raises ConfigError."""
    if not isinstance(schedule, str):
        peak = peak_of(schedule)
        return lambda epoch, epochs: schedule[row_at(schedule, epoch)][1] / peak
    kind, *words = schedule.split(":")
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
    raise ConfigError(f"schedule={schedule}", wanted=FORMS, fix="schedule=step:30:0.1")


def peak_of(table: Table) -> float:
    """The highest learning rate of a schedule table."""
    return max(lr for _, lr, *_ in table)


def learning_rate(
    schedule: str | Table,
    *,
    peak_lr: float,
    epoch: float,
    epochs: float,
    warmup_epochs: float,
    step_epochs: float,
) -> float:
    """Learning rate of the step that starts at `epoch` (a fraction) and is `step_epochs` long.

    The warm-up ramp uses the step's end, so that the first rate is not 0 and the ramp ends at the peak.
    """
    lr = peak_lr * parse_schedule(schedule)(epoch, epochs)
    if epoch < warmup_epochs:
        lr *= min(1.0, (epoch + step_epochs) / warmup_epochs)
    return lr


def weight_decay(schedule: str | Table, *, epoch: float, otherwise: float) -> float:
    """Weight decay of the step that starts at `epoch`: the table's, else `otherwise`."""
    if isinstance(schedule, str) or len(schedule[0]) < 3:
        return otherwise
    return schedule[row_at(schedule, epoch)][2]


def image_sizes_of(value: Any, *, key: str) -> Table:
    """A table [[EPOCHS_DONE, PX], ...] from text or lists; empty for an empty one. Raises ConfigError."""
    if not value and key == "image_sizes":  # its default
        return ()
    table = table_of(key, value, first=0, columns=(2,), row="[EPOCHS_DONE, PX] in every row")
    low, high = IMAGE_SIZES
    for _, side in table:
        if not low <= side <= high or side != int(side):
            raise ConfigError(f"{key} has {side:g} px", wanted=f"whole numbers from {low} to {high}")
    return tuple((epoch, int(side)) for epoch, side in table)


def image_size(table: Table, *, epoch: float, otherwise: int) -> int:
    """Side of the crops of the step that starts after `epoch` epochs, in px."""
    return table[row_at(table, epoch, first=0)][1] if table else otherwise
