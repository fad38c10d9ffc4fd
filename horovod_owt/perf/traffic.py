"""Bytes that a rank sends per step, by purpose: a closed form of parallel.traffic's counters.

The algorithms are the same: 2 (n-1)/n of the buffer for a ring allreduce (Patarasuk and Yuan 2009), own rows
times peers for an allgather, the peers' shares for a sum by alltoall.
"""

from __future__ import annotations

from horovod_owt.compression import keeps_errors, low_rank_pays, one_bit_row_bytes, powersgd_rank
from horovod_owt.config import TrainConfig
from horovod_owt.perf.network import (
    CONVOLUTIONS,
    FC6_IN,
    HIDDEN,
    conv_parameters,
    fc_layers,
    fc_parameters,
    share,
)

KEPT_BYTES = {"fp32": 4, "bf16": 4, "fp16": 4, "fp64": 8}  # per weight, gradient or logit
PASS_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}  # per feature, unit or gradient of them
LABEL_BYTES = 8
MOMENT_BYTES = 2 * 8  # two float64 sums per channel or unit


def bytes_sent_per_step(cfg: TrainConfig, world_size: int, *, index: int = 0) -> dict[str, int]:
    """Bytes that the rank at `index` of its fc_group sends in one step, by purpose; zeros are omitted.

    `cfg.parallel` and `cfg.fc_group_size` must have been resolved. Validation and checkpoints are not
    included.
    """
    group_size = cfg.ranks_per_classifier()
    groups = world_size // group_size
    kept = KEPT_BYTES[cfg.precision]
    gradient = gradient_bytes(cfg)
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
        "fc gradients": fc_updates * fc_gradients(cfg, shard, groups),
        "step facts": ring(4 * (5 + 3 * world_size), world_size),  # five sums, three times of each rank
        "gradient norm": ring(8, group_size) if cfg.clip_norm else 0,
        "layer norms": ring(2 * 8 * (30 if batch_norm else 16), group_size) if cfg.optimizer == "lars" else 0,
        "loss": fc_updates * ring(2 * kept, world_size) if cfg.fc_batch == "local" else 0,
    }
    return {what: number for what, number in sent.items() if number}


def gradient_bytes(cfg: TrainConfig) -> int:
    """Bytes of a gradient on the network, without lossy compression."""
    return 2 if cfg.compression == "fp16" else KEPT_BYTES[cfg.precision]


def fc_gradients(cfg: TrainConfig, parameters: int, ranks: int) -> int:
    """Bytes that each of `ranks` ranks sends to sum its FC layers' gradients; of onebit, the ranks' mean."""
    kept, rank = gradient_bytes(cfg), powersgd_rank(cfg.compression)
    rest, sent = parameters, 0
    for columns, rows in fc_layers(cfg.classes) if keeps_errors(cfg.compression) else ():
        if rank and not low_rank_pays(rows, columns, rank):
            continue
        rest -= rows * columns
        if rank:
            sent += sum(ring(side * min(rank, rows, columns) * kept, ranks) for side in (rows, columns))
        else:  # the rows to their owners, and back to all
            sent += ring(rows * one_bit_row_bytes(columns, kept), ranks)
    return sent + ring(rest * kept, ranks)


def exchanged(
    batch: int, classes: int, group_size: int, *, index: int = 0, pass_bytes: int = 4, kept_bytes: int = 4
) -> dict[str, int]:
    """Bytes sent inside an fc_group for one micro-batch of `batch` images per rank, under either scheme."""
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
    """Bytes that each rank sends in a ring allreduce of a buffer."""
    return 2 * (ranks - 1) * buffer_bytes // ranks


def break_even_batch(group_size: int, classes: int = 1000, *, pass_bytes: int = 4) -> float:
    """Images per rank at which hybrid and data-parallel send the same bytes; with fewer, hybrid sends less.

    Splitting the layers saves 2 (K-1)/K of the bytes of their gradients and costs 2 (K-1) b (9216 + 4096 +
    classes) numbers. This holds for any number of groups, since sums between groups add the same bytes to
    both. Labels are not counted.
    """
    per_image = (FC6_IN + HIDDEN) * pass_bytes + classes * 4
    return fc_parameters(classes) * 4 / (group_size * per_image)


def _batch_norm(world_size: int, groups: int, own_units: int) -> int:
    """Moments forward and backward, over all ranks for convolutions, over shard groups for hidden layers."""
    convolutions = sum(ring(channels * MOMENT_BYTES, world_size) for _, channels, _ in CONVOLUTIONS)
    return 2 * (convolutions + 2 * ring(own_units * MOMENT_BYTES, groups))
