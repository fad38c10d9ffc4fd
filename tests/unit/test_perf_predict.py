"""Which strategy is predicted to be faster: by bytes alone, and with what compute hides and saves."""

import dataclasses

import pytest

from horovod_owt.config import TrainConfig
from horovod_owt.perf.predict import Communication, Compute, predict
from horovod_owt.perf.traffic import break_even_batch, bytes_sent_per_step

# Compute that neither strategy saves: what is left is communication.
EVEN = Compute(
    conv_forward_s=0.1,
    conv_backward_s=0.2,
    data_classifier_s=0.1,
    hybrid_classifier_s=0.1,
    data_update_s=0.02,
    hybrid_update_s=0.02,
)


def communication(batch: int, group_size: int, bytes_per_s: float) -> Communication:
    """Of one group, on a network that only its bandwidth limits."""

    def seconds(parallel: str, *names: str) -> float:
        cfg = TrainConfig(batch=batch, classes=1000, parallel=parallel, fc_group_size=group_size)
        sent = bytes_sent_per_step(cfg, group_size)
        return sum(sent[name] for name in names) / bytes_per_s

    return Communication(
        all_gradients_s=seconds("data", "conv gradients", "fc gradients"),
        conv_gradients_s=seconds("hybrid", "conv gradients"),
        shard_gradients_s=0.0,
        exchange_s=seconds(
            "hybrid", "features", "fc7 units", "logits", "fc7 units back", "features back"
        ),
    )  # fmt: skip


def faster(batch: int, group_size: int, bytes_per_s: float, *, can_hide: bool = False) -> str:
    network = communication(batch, group_size, bytes_per_s)
    return predict(EVEN, network, accum_steps=1, can_hide=can_hide).faster


def test_a_slow_network_and_few_images_ask_for_hybrid():
    assert faster(32, 2, 125e6) == faster(32, 2, 125e6, can_hide=True) == "hybrid"


def test_a_fast_network_hides_the_gradients_but_not_the_exchange():
    assert faster(512, 8, 10e9, can_hide=True) == "data"
    assert faster(32, 2, 10e9, can_hide=True) == "data"


@pytest.mark.parametrize("group_size", [2, 4, 8, 16])
def test_where_nothing_hides_the_bytes_decide(group_size):
    batch = break_even_batch(group_size)
    assert faster(round(0.98 * batch), group_size, 1e9) == "hybrid"
    assert faster(round(1.02 * batch), group_size, 1e9) == "data"


def test_a_step_is_the_sum_of_its_parts():
    network = Communication(all_gradients_s=0.5, conv_gradients_s=0.1, shard_gradients_s=0.3, exchange_s=0.05)
    shown = predict(EVEN, network, accum_steps=2, can_hide=False)
    assert shown.data_s == pytest.approx(2 * 0.4 + 0.02 + 0.5)
    assert shown.hybrid_s == pytest.approx(2 * (0.4 + 0.05) + 0.02 + 0.4)
    hidden = predict(EVEN, network, accum_steps=2, can_hide=True)
    assert hidden.data_s == pytest.approx(2 * 0.4 + 0.02 + 0.3)
    assert hidden.hybrid_s == pytest.approx(2 * (0.4 + 0.05) + 0.02 + 0.2)


def test_an_update_of_fewer_weights_counts():
    network = communication(512, 8, 10e9)
    saves = dataclasses.replace(EVEN, hybrid_classifier_s=0.05, hybrid_update_s=0.0025)
    assert predict(saves, network, accum_steps=1, can_hide=True).faster == "hybrid"
