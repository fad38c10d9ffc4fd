"""`parallel=auto`: measure the parts of a step and choose the strategy predicted to be faster."""

from __future__ import annotations

import dataclasses
import logging

from horovod_owt.compression import keeps_errors
from horovod_owt.config import TrainConfig
from horovod_owt.parallel.parts import Seconds, measure_parts
from horovod_owt.parallel.runtime import World
from horovod_owt.perf.layers import net_of
from horovod_owt.perf.predict import step_time

log = logging.getLogger(__name__)


def choose_parallel(cfg: TrainConfig, world: World) -> tuple[TrainConfig, Seconds]:
    """`cfg` with `parallel` resolved, the same on every rank, and the predicted step times in ms, if any.

    Every rank must call it. A strategy that the user chose is kept.
    """
    if cfg.parallel != "auto":
        return cfg, {}
    why_not = _why_not_hybrid(cfg, world)
    if why_not:
        choice, predicted_ms, line = "data", {}, f"parallel auto: data ({why_not})"
    else:
        net = net_of(cfg.model, classes=cfg.classes, image_size=cfg.image_size)
        parts = measure_parts(cfg, world, {"data": 1, "hybrid": cfg.fc_group_size})
        seconds = {
            strategy: step_time(each, net, accum_steps=cfg.accum_steps).total_s
            for strategy, each in parts.items()
        }
        choice = "hybrid" if seconds["hybrid"] < seconds["data"] else "data"
        predicted_ms = {strategy: 1e3 * s for strategy, s in seconds.items()}
        line = _line(choice, seconds, world.size)
    if world.is_root:
        log.info("%s", line)
    return dataclasses.replace(cfg, parallel=choice), predicted_ms


def _why_not_hybrid(cfg: TrainConfig, world: World) -> str:
    """Why hybrid is ruled out without a measurement; empty if it is not."""
    if world.size == 1:
        return "one rank"
    if cfg.fc_group_size == 1:
        return "fc_group_size is 1: no ranks to split the layers over"
    if cfg.precision == "fp16":
        return "hybrid does not support fp16"
    if keeps_errors(cfg.compression):
        return f"compression={cfg.compression} is for data"
    return ""


def _line(choice: str, seconds: Seconds, ranks: int) -> str:
    (other,) = seconds.keys() - {choice}
    return (
        f"parallel auto: {choice} (predicted {seconds[choice]:.3g} s a step on {ranks} ranks; "
        f"{other} {seconds[other]:.3g} s); override with --parallel {other}"
    )
