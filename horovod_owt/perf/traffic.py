"""Bytes that a rank sends in one step, by what they carry: the closed form of parallel.traffic's counters.

The algorithms are those of the counters: a ring's 2 (n-1)/n of what is summed everywhere (Patarasuk and
Yuan 2009), own rows times peers of a gather, the peers' shares of a sum by alltoall.
"""

from __future__ import annotations

from horovod_owt.config import TrainConfig
from horovod_owt.perf.network import CONVOLUTIONS, FC6_IN, HIDDEN, conv_parameters, fc_parameters, share

KEPT_BYTES = {"fp32": 4, "bf16": 4, "fp16": 4, "fp64": 8}  # a number of weights, gradients, logits
PASS_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}  # of features, units and their gradients
LABEL_BYTES = 8
MOMENT_BYTES = 2 * 8  # two sums in float64 for each channel or unit


def bytes_sent_per_step(cfg: TrainConfig, world_size: int, *, index: int = 0) -> dict[str, int]:
    """What the rank at `index` of its fc_group sends in one step; what is nothing is left out.

    `cfg.parallel` and `cfg.fc_group_size` are resolved. Sums for validation and checkpoints are not in it.
    """
    group_size = cfg.ranks_per_classifier()
    groups = world_size // group_size
    kept = KEPT_BYTES[cfg.precision]
    gradient = 2 if cfg.compression == "fp16" else kept
    batch_norm = cfg.model == "alexnet-owt-bn"
    fc_updates = group_size * cfg.accum_steps if cfg.fc_batch == "local" else 1
    shard = fc_parameters(cfg.classes, group_size=group_size, index=index, batch_norm=batch_norm)
    micro_step = exchanged(
        cfg.batch,
        cfg.classes,
        group_size,
        index=index,
        pass_bytes=PASS_BYTES[cfg.precision],
        kept_bytes=kept,
    )
    if cfg.sync_bn and batch_norm:
        micro_step["batch norm"] = _batch_norm(world_size, groups, share(HIDDEN, group_size, index))
    sent = {
        **{what: cfg.accum_steps * number for what, number in micro_step.items()},
        "conv gradients": ring(conv_parameters(batch_norm=batch_norm) * gradient, world_size),
        "fc gradients": fc_updates * ring(shard * gradient, groups),
        "step facts": ring(4 * 4, world_size),
        "gradient norm": ring(8, group_size) if cfg.clip_norm else 0,
        "loss": fc_updates * ring(2 * kept, world_size) if cfg.fc_batch == "local" else 0,
    }
    return {what: number for what, number in sent.items() if number}


def exchanged(
    batch: int, classes: int, group_size: int, *, index: int = 0, pass_bytes: int = 4, kept_bytes: int = 4
) -> dict[str, int]:
    """What moves inside an fc_group for one micro-batch of `batch` images a rank, under either scheme."""
    peers, group_batch = group_size - 1, group_size * batch
    own = share(HIDDEN, group_size, index)
    features = peers * batch * FC6_IN * pass_bytes
    return {
        "labels": peers * batch * LABEL_BYTES,
        "features": features,
        "fc7 units": (HIDDEN - own) * group_batch * pass_bytes,
        "logits": ring(group_batch * classes * kept_bytes, group_size),
        "fc7 units back": peers * own * group_batch * pass_bytes,
        "features back": features,
    }


def ring(buffer_bytes: int, ranks: int) -> int:
    """What each rank sends in a ring-allreduce of a buffer."""
    return 2 * (ranks - 1) * buffer_bytes // ranks


def break_even_batch(group_size: int, classes: int = 1000, *, pass_bytes: int = 4) -> float:
    """Images a rank at which hybrid and data-parallel send equally many bytes: fewer, and hybrid sends less.

    Splitting the layers saves 2 (K-1)/K of their gradients' bytes, and 2 (K-1) b (9216 + 4096 + classes)
    numbers are exchanged instead. It holds for any number of groups: where there are several, the sums
    between them cost hybrid what they add to data's. The few bytes of labels are left out.
    """
    per_image = (FC6_IN + HIDDEN) * pass_bytes + classes * 4
    return fc_parameters(classes) * 4 / (group_size * per_image)


def _batch_norm(world_size: int, groups: int, own_units: int) -> int:
    """Moments forward and back: of all ranks for convolutions, of the same units' ranks for hidden layers."""
    convolutions = sum(ring(channels * MOMENT_BYTES, world_size) for _, channels, _ in CONVOLUTIONS)
    return 2 * (convolutions + 2 * ring(own_units * MOMENT_BYTES, groups))
