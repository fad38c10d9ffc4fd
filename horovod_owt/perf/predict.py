"""The time of a step from the times of its parts.

`owt plan` computes the parts from a machine's figures, `--parallel auto` measures them; both add them up
here.
"""

from __future__ import annotations

from dataclasses import dataclass

from horovod_owt.perf.layers import Net

FC_BACKWARD = 2 / 3  # of a classifier's arithmetic: the gradients of weights and inputs
MAX_BUCKET_ELEMENTS = 4 * 2**20  # gradients sent together: 16 MB of fp32 reach a ring's bandwidth
MIN_BUCKETS = 4  # for a small buffer, so that most of it is sent before the first layer's gradient is ready


def bucket_elements(parameters: int) -> int:
    """Gradients per bucket, of `parameters` in all."""
    return min(MAX_BUCKET_ELEMENTS, -(-parameters // MIN_BUCKETS))


@dataclass(frozen=True)
class Sum:
    """Seconds to sum a buffer of gradients over ranks, with nothing else running."""

    busy_s: float = 0.0  # while a CPU rank's own cores move bytes and cannot compute
    wire_s: float = 0.0  # the rest, which overlaps with the backward pass

    @property
    def total_s(self) -> float:
        return self.busy_s + self.wire_s


@dataclass(frozen=True)
class Parts:
    """Times of the parts of a step under one strategy, on the slowest rank."""

    conv_forward_s: float  # of a micro-batch
    conv_backward_s: float  # of a micro-batch
    classifier_s: float  # of a micro-batch: this rank's part of the FC layers, forward and backward
    exchange_s: float  # of a micro-batch: transfers inside the fc_group that the next layer waits for
    update_s: float
    conv_sum: Sum
    fc_sum: Sum
    fc_reply_s: float = 0.0  # second transfers of compressed FC sums, after the backward pass


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, in three parts that add up."""

    compute_s: float
    exchange_s: float
    exposed_s: float  # sums of gradients, as far as the backward pass does not hide them

    @property
    def total_s(self) -> float:
        return self.compute_s + self.exchange_s + self.exposed_s


def step_time(parts: Parts, net: Net, *, accum_steps: int = 1, overlap: float = 1.0) -> StepTime:
    """The time of a step: compute plus exposed communication.

    A layer's gradients are sent as soon as the last backward pass has computed them, one buffer after
    another, so the FC layers' are hidden by the convolutions' backward pass and the first convolution's by
    nothing. `overlap` is the share of the hideable communication that the software does hide.
    """
    micro_batch_s = parts.conv_forward_s + parts.conv_backward_s + parts.classifier_s
    busy_s = parts.conv_sum.busy_s + parts.fc_sum.busy_s
    wire_s = parts.conv_sum.wire_s + parts.fc_sum.wire_s
    hidden_s = overlap * (wire_s - _unsent_after_backward(parts, net))
    return StepTime(
        compute_s=accum_steps * micro_batch_s + parts.update_s,
        exchange_s=accum_steps * parts.exchange_s,
        exposed_s=busy_s + wire_s - hidden_s + parts.fc_reply_s,
    )


def _unsent_after_backward(parts: Parts, net: Net) -> float:
    """Seconds of wire time left when the backward pass, from the last layer to the first, is done.

    FC layers and convolutions have a buffer each, in equal buckets; a bucket is sent when the gradients of
    the first layer in it are ready.
    """
    computed_s = sent_s = 0.0
    for kind, backward_s, summed in (
        ("fc", FC_BACKWARD * parts.classifier_s, parts.fc_sum),
        ("conv", parts.conv_backward_s, parts.conv_sum),
    ):
        layers = [layer for layer in net.layers() if layer.kind == kind]
        flops = sum(layer.backward_flops for layer in layers)
        total = unsent = ready_from = net.parameters(kind)
        bucket = bucket_elements(total)
        for layer in reversed(layers):
            computed_s += backward_s * layer.backward_flops / flops
            ready_from -= layer.parameters
            whole_from = -(-ready_from // bucket) * bucket
            if whole_from < unsent:
                sent_s = max(sent_s, computed_s) + summed.wire_s * (unsent - whole_from) / total
                unsent = whole_from
    return max(0.0, sent_s - computed_s)
