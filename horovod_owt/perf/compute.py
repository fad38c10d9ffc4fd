"""An upper estimate of a step's time, beyond which something must be wrong."""

from __future__ import annotations

from horovod_owt.config import TrainConfig
from horovod_owt.perf.layers import net_of

MAX_THREADS = 8  # further threads are not counted, because small layers do not scale
BYTES_PER_S = 4e9  # memory bandwidth of one rank
PASSES = 8  # of an update over each parameter: gradient, momentum, weight, read and written, and copies
OVERHEAD_S = 0.2
SLOWDOWN = {"bf16": 8.0, "fp64": 2.0}  # relative to fp32, on a CPU without instructions for the precision


def generous_step_s(cfg: TrainConfig, *, flops_per_s: float, threads: int) -> float:
    """Seconds that a step should take at most, without waiting for images and communication.

    `flops_per_s` is the fp32 rate of one thread. Hybrid steps have the same operations and fewer parameters.
    """
    net = net_of(cfg.model, classes=cfg.classes, image_size=cfg.image_size)
    seconds = cfg.rank_batch() * net.flops() / (flops_per_s * min(threads, MAX_THREADS))
    update_s = 4 * PASSES * net.parameters() / BYTES_PER_S
    return seconds * SLOWDOWN.get(cfg.precision, 1.0) + update_s + OVERHEAD_S
