"""Draw docs/schedules.svg: python docs/draw_schedules.py. A test keeps the file equal to what this draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from drawing import EDGE, FAINT, PANEL, box, svg, text

from horovod_owt.config import TrainConfig, from_mapping
from horovod_owt.recipe import Recipe, built_in_recipes
from horovod_owt.schedule import learning_rate, weight_decay

FILE = Path(__file__).with_name("schedules.svg")

RATE, DECAY = "#2f78a8", "#b9691c"
WIDE, HIGH, BESIDE, ABOVE, COLUMNS = 300, 150, 70, 70, 2  # px of a plot, and around it
POINTS = 240  # of a line
DECADES = 4  # of learning rate below the peak


def plot(recipe: Recipe, left: float, top: float) -> list[str]:
    """Learning rate on a logarithmic scale, weight decay on a linear one; both with epochs."""
    cfg, batch = from_mapping(recipe.values), recipe.about["global_batch"]
    peak = peak_lr(cfg, batch)
    decay = [weight_decay(cfg.schedule, epoch=e, otherwise=cfg.weight_decay) for e in range(cfg.epochs)]

    def rate_height(epoch: float) -> float:
        share = lr_of(cfg, batch)(epoch) / peak
        return max(0.0, 1 + math.log10(share) / DECADES) if share > 0 else 0.0

    def decay_height(epoch: float) -> float:
        return decay[min(int(epoch), cfg.epochs - 1)] / max(decay) * 0.9

    bottom, right = top + HIGH, left + WIDE
    return [
        box(left, top, WIDE, HIGH, PANEL),
        text(left + WIDE / 2, top - 28, recipe.name, size=15, weight="bold"),
        text(left + WIDE / 2, top - 10, f"global batch {batch}, {cfg.epochs} epochs", size=12, fill=FAINT),
        text(left - 30, top + 12, f"{peak:.2g}", size=12, fill=RATE),
        text(left - 30, bottom, f"{peak / 10**DECADES:.2g}", size=12, fill=RATE),
        text(right + 34, bottom - 0.9 * HIGH + 4, f"{max(decay):.0e}", size=12, fill=DECAY),
        text(right + 34, bottom, "0", size=12, fill=DECAY),
        text(left, bottom + 18, "0", size=12, fill=FAINT),
        text(right, bottom + 18, str(cfg.epochs), size=12, fill=FAINT),
        *(_grid(left, top + HIGH * n / DECADES) for n in range(1, DECADES)),
        _line(left, bottom, cfg.epochs, decay_height, DECAY, 'stroke-dasharray="5 4"'),
        _line(left, bottom, cfg.epochs, rate_height, RATE, 'stroke-width="2"'),
    ]


def lr_of(cfg: TrainConfig, batch: int) -> Callable[[float], float]:
    """Learning rate by epoch at that global batch."""
    return lambda epoch: learning_rate(
        cfg.schedule,
        peak_lr=peak_lr(cfg, batch),
        epoch=epoch,
        epochs=cfg.epochs,
        warmup_epochs=cfg.warmup_epochs,
        step_epochs=0.0,
    )


def peak_lr(cfg: TrainConfig, batch: int) -> float:
    return cfg.peak_lr(world_size=1) * batch / cfg.global_batch(world_size=1)


def _line(
    left: float, bottom: float, epochs: int, height: Callable[[float], float], colour: str, style: str
) -> str:
    points = [(n / POINTS, height(epochs * n / POINTS)) for n in range(POINTS)]
    path = "L".join(f"{left + WIDE * x:.1f} {bottom - HIGH * y:.1f}" for x, y in points)
    return f'<path d="M{path}" stroke="{colour}" {style}/>'


def _grid(left: float, y: float) -> str:
    return f'<path d="M{left:g} {y:g}h{WIDE}" stroke="{EDGE}" stroke-width="0.5"/>'


def drawing() -> str:
    recipes = list(built_in_recipes())
    rows = math.ceil(len(recipes) / COLUMNS)
    parts = []
    for number, recipe in enumerate(recipes):
        row, column = divmod(number, COLUMNS)
        parts += plot(recipe, BESIDE + column * (WIDE + 2 * BESIDE), ABOVE + row * (HIGH + ABOVE + 20))
    width, height = COLUMNS * (WIDE + 2 * BESIDE), rows * (HIGH + ABOVE + 20) + 50
    key = [
        text(width / 2 - 150, height - 16, "learning rate, logarithmic", fill=RATE),
        text(width / 2 + 150, height - 16, "weight decay (dashed), linear", fill=DECAY),
    ]
    return svg(width, height, "Learning rate and weight decay of each recipe by epoch", *parts, *key)


if __name__ == "__main__":
    FILE.write_text(drawing())
