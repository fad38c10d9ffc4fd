"""Compute the parts of a step from a machine's figures; `parallel.parts` measures the same parts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from horovod_owt.compression import keeps_errors, powersgd_rank
from horovod_owt.config import TrainConfig
from horovod_owt.perf.layers import Net
from horovod_owt.perf.machine import Machine
from horovod_owt.perf.predict import Parts, Sum
from horovod_owt.perf.traffic import PASS_BYTES, exchanged, fc_gradients

# Passes over memory
FC_PASSES = 3  # over the classifier's weights: forward, input gradient, weight gradient
UPDATE_PASSES = 5  # over 4 bytes a weight: read weight, gradient and momentum, write weight and momentum
WEIGHT_BYTES = 4
# Of compression, from its time on a CPU relative to that of an addition; see parallel.one_bit.
QUANTISE_PASSES, DEQUANTISE_PASSES = 21, 10
LOW_RANK_PASSES = 10  # add the error, two products, the approximation, the new error


@dataclass(frozen=True)
class Job:
    """A configuration with `parallel` and `fc_group_size` resolved, and the ranks that it runs on."""

    cfg: TrainConfig
    net: Net
    nodes: int
    ranks_per_node: int
    decodes: bool = True  # whether JPEGs are decoded
    two_level: bool = False

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


def parts_of(machine: Machine, job: Job) -> Parts:
    """The parts of a step."""
    cfg, net, ranks = job.cfg, job.net, job.ranks
    group_size = cfg.ranks_per_classifier()
    conv_rate, fc_rate = (
        1e9 * machine.speedup(cfg.precision) * machine[key] for key in ("conv_gflops", "fc_gflops")
    )
    convs = [layer for layer in net.layers() if layer.kind == "conv"]
    turns = group_size if cfg.owt_scheme == "b" else 1
    shard = net.parameters("fc") / group_size
    updates = group_size * cfg.accum_steps if cfg.fc_batch == "local" else 1

    fixed_s = 1e-3 * machine["fixed_ms"]
    conv_forward_s = cfg.batch * sum(layer.forward_flops for layer in convs) / conv_rate
    products_s = net.flops("fc") * cfg.batch / fc_rate
    classifier_s = products_s + _passes_s(machine, FC_PASSES * turns, shard)
    fc_sums = _fc_sums(machine, job, shard * updates)
    return Parts(
        conv_forward_s=fixed_s + conv_forward_s,
        conv_backward_s=cfg.batch * sum(layer.backward_flops for layer in convs) / conv_rate,
        classifier_s=classifier_s,
        exchange_s=_exchange_s(machine, job, compute_s=classifier_s / turns),
        update_s=_passes_s(machine, UPDATE_PASSES, net.parameters("conv") + updates * shard)
        + fc_sums.compute_s,
        conv_sum=machine.links(job.ranks_per_node).allreduce(
            net.parameters("conv") * _gradient_bytes(cfg), ranks, two_level=job.two_level
        ),
        fc_sum=fc_sums.first,
        fc_reply_s=fc_sums.reply_s,
    )


def _passes_s(machine: Machine, passes: float, numbers: float) -> float:
    """Seconds of `passes` passes over fp32 `numbers` in memory."""
    return passes * WEIGHT_BYTES * numbers / (1e9 * machine["memory_gb_s"])


def _gradient_bytes(cfg: TrainConfig) -> int:
    return 2 if cfg.compression == "fp16" else WEIGHT_BYTES


@dataclass(frozen=True)
class _FcSums:
    """How the FC layers' gradients are summed."""

    first: Sum  # may overlap with the backward pass
    reply_s: float = 0.0  # of compressed ones: transfers that begin after it
    compute_s: float = 0.0  # of compressed ones: compressing and the reverse


def _fc_sums(machine: Machine, job: Job, gradients: float) -> _FcSums:
    """The sum of this rank's FC gradients; if compressed, in two transfers of half the bytes.

    These send rows to their owners and back (onebit), or P and then Q (powersgd).
    """
    cfg, net, ranks = job.cfg, job.net, job.ranks
    links, group_size = machine.links(job.ranks_per_node), cfg.ranks_per_classifier()
    if not keeps_errors(cfg.compression) or ranks == 1:
        buffer_bytes = gradients * _gradient_bytes(cfg)
        groups = ranks // group_size
        return _FcSums(links.allreduce(buffer_bytes, groups, rings=group_size, two_level=job.two_level))
    sent = fc_gradients(dataclasses.replace(cfg, classes=net.classes), net.parameters("fc"), ranks)
    if powersgd_rank(cfg.compression):
        buffer_bytes = sent / 2 / (2 * (ranks - 1) / ranks)
        half = links.allreduce(buffer_bytes, ranks, two_level=job.two_level)
        passes = LOW_RANK_PASSES
    else:
        half = links.exchange(sent / 2, ranks - 1, ranks)
        passes = QUANTISE_PASSES * (1 + 1 / ranks) + 2 * DEQUANTISE_PASSES
    return _FcSums(half, half.total_s, _passes_s(machine, passes, net.parameters("fc")))


def _exchange_s(machine: Machine, job: Job, *, compute_s: float) -> float:
    """Seconds that a micro-batch waits for transfers inside its fc_group.

    Scheme b sends the features of one rank at a time, overlapping with the `compute_s` of the previous turn;
    the first transfer forward and the last one back are exposed, and so is time that keeps the cores busy.
    """
    cfg, size = job.cfg, job.cfg.ranks_per_classifier()
    if size == 1:
        return 0.0
    links, pass_bytes = machine.links(job.ranks_per_node), PASS_BYTES[cfg.precision]
    sent = exchanged(cfg.batch, job.net.classes, size, pass_bytes=pass_bytes)
    features = sent["features"]
    inner = sum(sent[name] for name in ("fc7 units", "logits", "fc7 units back"))
    hop = size - 1  # messages of a gather or an alltoall; a ring sum has twice as many
    if cfg.owt_scheme == "a":
        return links.exchange(2 * features + inner, 6 * hop, size).total_s
    inner_s = links.exchange(inner, size * 4 * hop, size).total_s
    to_all = links.exchange(features / hop, hop, size)  # a pipelined broadcast
    to_owner = links.exchange(features, hop, size)
    exposed_s = 0.0
    for turn in (to_all, to_owner):
        exposed_s += turn.wire_s + (size - 1) * max(0.0, turn.wire_s - compute_s) + size * turn.busy_s
    return inner_s + exposed_s
