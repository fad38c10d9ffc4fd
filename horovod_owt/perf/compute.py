"""A generous estimate of a step's time, beyond which something holds a rank up."""

from __future__ import annotations

from horovod_owt.config import TrainConfig
from horovod_owt.perf.layers import net_of

MAX_THREADS = 8  # more threads than these are not counted: small layers do not scale
BYTES_PER_S = 4e9  # of memory, for one rank
PASSES = 8  # of an update over each parameter: gradient, momentum, weight, read and written, and copies
OVERHEAD_S = 0.2
WITHOUT_INSTRUCTIONS = {"bf16": 8.0, "fp64": 2.0}  # time against fp32 on a CPU that has none for them


def generous_step_s(cfg: TrainConfig, *, flops_per_s: float, threads: int) -> float:
    """Time in which a rank that is not held up finishes a step, images and communication left out.

    `flops_per_s` is the fp32 rate of one thread. Hybrid steps have the same operations, and fewer parameters.
    """
    net = net_of(cfg.model, classes=cfg.classes, image_size=cfg.image_size)
    seconds = cfg.rank_batch() * net.flops() / (flops_per_s * min(threads, MAX_THREADS))
    update_s = 4 * PASSES * net.parameters() / BYTES_PER_S
    return seconds * WITHOUT_INSTRUCTIONS.get(cfg.precision, 1.0) + update_s + OVERHEAD_S
