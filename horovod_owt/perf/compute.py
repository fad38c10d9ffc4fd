"""The floating-point operations of a training step, and a generous estimate of its time from them."""

from __future__ import annotations

from horovod_owt.config import TrainConfig
from horovod_owt.perf.network import CONVOLUTIONS, conv_parameters, fc_layers, fc_parameters

CONV_OUTPUT = (55, 27, 13, 13, 13)  # side of each convolution's output at 224 px
MOST_THREADS = 8  # more threads than these are not counted: small layers do not scale
BYTES_PER_S = 4e9  # of memory, for one rank
PASSES = 8  # of an update over each parameter: gradient, momentum, weight, read and written, and copies
OVERHEAD_S = 0.2
WITHOUT_INSTRUCTIONS = {"bf16": 8.0, "fp64": 2.0}  # time against fp32 on a CPU that has none for them


def step_flops(cfg: TrainConfig) -> float:
    """Operations of one rank in one step, forward and backward: 4.3 GFLOP per image of 224 px."""
    scale = (cfg.image_size / 224) ** 2
    convolutions = sum(
        c_in * c_out * (kernel * side) ** 2
        for (c_in, c_out, kernel), side in zip(CONVOLUTIONS, CONV_OUTPUT, strict=True)
    )
    classifier = sum(units_in * units_out for units_in, units_out in fc_layers(cfg.classes))
    return 6 * cfg.rank_batch() * (scale * convolutions + classifier)


def generous_step_s(cfg: TrainConfig, *, flops_per_s: float, threads: int) -> float:
    """Time in which a rank that is not held up finishes a step, images and communication left out.

    `flops_per_s` is the fp32 rate of one thread. Hybrid steps have the same operations, and fewer parameters.
    """
    seconds = step_flops(cfg) / (flops_per_s * min(threads, MOST_THREADS))
    parameters = conv_parameters() + fc_parameters(cfg.classes)
    update_s = 4 * PASSES * parameters / BYTES_PER_S
    return seconds * WITHOUT_INSTRUCTIONS.get(cfg.precision, 1.0) + update_s + OVERHEAD_S
