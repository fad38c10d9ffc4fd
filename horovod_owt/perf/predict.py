"""Predict the time of a step under each strategy from measurements of its parts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Compute:
    """Seconds of one rank's computation, measured while all ranks compute."""

    conv_forward_s: float  # of a micro-batch
    conv_backward_s: float  # of a micro-batch; gradient sums may overlap with it
    data_classifier_s: float  # whole layers, own images: forward and backward
    hybrid_classifier_s: float  # a K-th of each layer, all images of the group
    data_update_s: float  # of the classifier's weights
    hybrid_update_s: float


@dataclass(frozen=True)
class Communication:
    """Seconds on the network, with nothing else running."""

    all_gradients_s: float  # data: summed over all ranks
    conv_gradients_s: float  # hybrid: summed over all ranks
    shard_gradients_s: float  # hybrid: the classifier's, summed over the groups; 0 for one group
    exchange_s: float  # hybrid: of a micro-batch, inside the fc_group


@dataclass(frozen=True)
class Prediction:
    """Predicted seconds of a step under each strategy."""

    data_s: float
    hybrid_s: float

    @property
    def faster(self) -> str:
        return "hybrid" if self.hybrid_s < self.data_s else "data"


def predict(
    compute: Compute, communication: Communication, *, accum_steps: int, can_hide: bool
) -> Prediction:
    """A step is its compute plus its exposed communication.

    On GPUs, gradient sums overlap with the last backward pass of the convolutions. CPU ranks move the bytes
    with the cores that they compute on, so nothing overlaps there. The exchange inside an fc_group never
    does: the next layer waits for it. (Scheme b overlaps a part of it; that is not modelled.)
    """
    convolutions_s = accum_steps * (compute.conv_forward_s + compute.conv_backward_s)
    behind_s = compute.conv_backward_s if can_hide else 0.0

    def exposed(sums_s: float) -> float:
        return max(0.0, sums_s - behind_s)

    return Prediction(
        data_s=convolutions_s
        + accum_steps * compute.data_classifier_s
        + compute.data_update_s
        + exposed(communication.all_gradients_s),
        hybrid_s=convolutions_s
        + accum_steps * (compute.hybrid_classifier_s + communication.exchange_s)
        + compute.hybrid_update_s
        + exposed(communication.conv_gradients_s + communication.shard_gradients_s),
    )
