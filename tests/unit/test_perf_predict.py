"""A step from its parts: what adds up, what the backward pass hides, and which strategy is faster."""

import dataclasses

import pytest

from horovod_owt.config import TrainConfig
from horovod_owt.perf.layers import net_of
from horovod_owt.perf.predict import FC_BACKWARD, Parts, Sum, step_time
from horovod_owt.perf.traffic import break_even_batch, bytes_sent_per_step

NET = net_of("alexnet-owt")
# Compute that neither strategy saves: what is left is communication.
EVEN = Parts(
    conv_forward_s=0.1,
    conv_backward_s=0.2,
    classifier_s=0.1,
    exchange_s=0.0,
    update_s=0.02,
    conv_sum=Sum(),
    fc_sum=Sum(),
)
COMPUTE_S = 0.1 + 0.2 + 0.1 + 0.02


def total_s(batch: int, group_size: int, bytes_per_s: float, *, hybrid: bool, overlap: float = 1.0) -> float:
    """Of one group, on a network that only its bandwidth limits."""
    cfg = TrainConfig(
        batch=batch, classes=1000, parallel="hybrid" if hybrid else "data", fc_group_size=group_size
    )  # fmt: skip
    sent = {what: n / bytes_per_s for what, n in bytes_sent_per_step(cfg, group_size).items()}
    exchanged = ("features", "fc7 units", "logits", "fc7 units back", "features back")
    parts = dataclasses.replace(
        EVEN,
        exchange_s=sum(sent.get(what, 0.0) for what in exchanged),
        conv_sum=Sum(wire_s=sent["conv gradients"]),
        fc_sum=Sum(wire_s=sent.get("fc gradients", 0.0)),
    )
    return step_time(parts, NET, overlap=overlap).total_s


def hybrid_is_faster(batch: int, group_size: int, bytes_per_s: float, *, overlap: float = 1.0) -> bool:
    hybrid, data = (
        total_s(batch, group_size, bytes_per_s, hybrid=hybrid, overlap=overlap) for hybrid in (True, False)
    )
    return hybrid < data


def test_a_slow_network_and_few_images_ask_for_hybrid():
    assert hybrid_is_faster(32, 2, 125e6)
    assert hybrid_is_faster(32, 2, 125e6, overlap=0.0)


def test_a_fast_network_hides_the_gradients_but_not_the_exchange():
    assert not hybrid_is_faster(512, 8, 10e9)
    assert not hybrid_is_faster(32, 2, 10e9)


@pytest.mark.parametrize("group_size", [2, 4, 8, 16])
def test_where_nothing_hides_the_bytes_decide(group_size):
    batch = break_even_batch(group_size)
    assert hybrid_is_faster(round(0.98 * batch), group_size, 1e9, overlap=0.0)
    assert not hybrid_is_faster(round(1.02 * batch), group_size, 1e9, overlap=0.0)


def test_a_step_is_the_sum_of_its_parts():
    parts = dataclasses.replace(EVEN, exchange_s=0.05, conv_sum=Sum(wire_s=0.1), fc_sum=Sum(wire_s=0.3))
    shown = step_time(parts, NET, accum_steps=2, overlap=0.0)
    assert shown.compute_s == pytest.approx(2 * 0.4 + 0.02)
    assert shown.exchange_s == pytest.approx(2 * 0.05)
    assert shown.exposed_s == pytest.approx(0.4)
    assert shown.total_s == pytest.approx(2 * 0.45 + 0.02 + 0.4)


def test_what_cores_do_is_never_hidden():
    parts = dataclasses.replace(EVEN, conv_sum=Sum(busy_s=0.01), fc_sum=Sum(busy_s=0.03))
    assert step_time(parts, NET).exposed_s == pytest.approx(0.04)


def test_gradients_of_fc_layers_hide_behind_the_convolutions_as_far_as_they_fit():
    fc_backward_s = FC_BACKWARD * EVEN.classifier_s
    fits = dataclasses.replace(EVEN, fc_sum=Sum(wire_s=0.19))
    assert step_time(fits, NET).exposed_s == 0.0
    # the last piece has all of fc8 and a few weights of fc7; then the line is never idle
    sent_s = 0.5
    _, fc7, fc8 = [layer.backward_flops for layer in NET.layers() if layer.kind == "fc"]
    first_s = fc_backward_s * (fc7 + fc8) / sum(
        layer.backward_flops for layer in NET.layers() if layer.kind == "fc"
    )  # fmt: skip
    late = dataclasses.replace(EVEN, fc_sum=Sum(wire_s=sent_s))
    expected_s = first_s + sent_s - fc_backward_s - EVEN.conv_backward_s
    assert step_time(late, NET).exposed_s == pytest.approx(expected_s)
    half = step_time(late, NET, overlap=0.5).exposed_s
    assert half == pytest.approx((sent_s + expected_s) / 2)


def test_the_piece_of_the_first_convolution_has_nothing_to_hide_behind():
    parts = dataclasses.replace(EVEN, conv_sum=Sum(wire_s=1e-3))
    assert step_time(parts, NET).exposed_s == pytest.approx(1e-3 / 4)  # conv1, conv2, and most of conv3


def test_an_update_of_fewer_weights_counts():
    saves = dataclasses.replace(EVEN, classifier_s=0.05, update_s=0.0025)
    assert step_time(saves, NET).total_s == pytest.approx(COMPUTE_S - 0.05 - 0.0175)
