"""The bytes of a step, against known values, against the model itself, against the units' distribution."""

import pytest

from horovod_owt.config import TrainConfig
from horovod_owt.perf.network import (
    CONVOLUTIONS,
    FC6_IN,
    HIDDEN,
    conv_parameters,
    fc_layers,
    fc_parameters,
)
from horovod_owt.perf.traffic import break_even_batch, bytes_sent_per_step


def sent(world_size: int, *, index: int = 0, **values) -> dict[str, int]:
    cfg = TrainConfig(**{"classes": 1000, "batch": 32, "fc_group_size": 2, **values})
    return bytes_sent_per_step(cfg, world_size, index=index)


@pytest.mark.parametrize("classes", [1000, 7])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_parameters_are_those_of_the_model(classes, batch_norm):
    import torch

    from horovod_owt.model import alexnet_owt

    with torch.device("meta"):
        model = alexnet_owt.AlexNetOWT(classes, batch_norm=batch_norm)

    def count(part) -> int:
        return sum(p.numel() for p in part.parameters())

    assert conv_parameters(batch_norm=batch_norm) == count(model.features)
    assert fc_parameters(classes, batch_norm=batch_norm) == count(model.classifier)
    assert (FC6_IN, HIDDEN) == (alexnet_owt.FC6_IN, alexnet_owt.HIDDEN)
    convolutions = [m for m in model.features if isinstance(m, torch.nn.Conv2d)]
    assert [(m.in_channels, m.out_channels, m.kernel_size[0]) for m in convolutions] == list(CONVOLUTIONS)


@pytest.mark.parametrize("group_size", [1, 2, 3, 8])
def test_the_parts_of_a_group_make_the_whole(group_size):
    parts = [fc_parameters(1000, group_size=group_size, index=index) for index in range(group_size)]
    assert sum(parts) == fc_parameters(1000)
    weights = sum(units_in * units_out for units_in, units_out in fc_layers(1000, group_size=group_size))
    assert weights <= parts[0] < weights + 10_000  # biases


def test_two_ranks_with_32_images_each_send_a_twentieth():
    data, hybrid = sent(2, parallel="data"), sent(2, parallel="hybrid")
    assert data == {"conv gradients": 9_878_784, "fc gradients": 234_524_576, "step facts": 44}
    assert hybrid == {
        "labels": 32 * 8,
        "features": 32 * 9216 * 4,
        "fc7 units": 32 * 4096 * 4,
        "logits": 2 * 32 * 1000 * 4,
        "fc7 units back": 32 * 4096 * 4,
        "features back": 32 * 9216 * 4,
        "conv gradients": 9_878_784,
        "step facts": 44,
    }
    assert sum(data.values()) / 1e6 == pytest.approx(244.4, abs=0.05)
    assert sum(hybrid.values()) / 1e6 == pytest.approx(13.54, abs=0.05)


def test_a_rank_alone_sends_nothing():
    assert sent(1, parallel="data", fc_group_size=1) == {}


def test_bf16_halves_what_passes_through_the_layers_but_neither_logits_nor_gradients():
    fp32, bf16 = sent(4, parallel="hybrid"), sent(4, parallel="hybrid", precision="bf16")
    halved = {name for name in fp32 if bf16[name] * 2 == fp32[name]}
    assert halved == {"features", "fc7 units", "fc7 units back", "features back"}
    assert all(bf16[name] == fp32[name] for name in fp32.keys() - halved)


def test_fp16_compression_halves_the_gradients():
    for parallel in ("data", "hybrid"):
        whole = sent(4, parallel=parallel)
        halved = sent(4, parallel=parallel, compression="fp16")
        for name in whole:
            assert halved[name] * (2 if "gradients" in name else 1) == whole[name]


@pytest.mark.parametrize(
    ("compression", "megabytes"), [("none", 244.4), ("fp16", 122.2), ("onebit", 17.32), ("powersgd:4", 10.34)]
)
def test_megabytes_of_two_ranks_by_compression(compression, megabytes):
    of_two = sent(2, parallel="data", compression=compression)
    assert sum(of_two.values()) / 1e6 == pytest.approx(megabytes, abs=0.05)


def test_a_matrix_that_low_rank_does_not_make_smaller_is_sent_whole():
    """4096 x 2 of rank 2: fc8 of a net of two classes."""
    two = sent(2, parallel="data", compression="powersgd:2", classes=2)["fc gradients"]
    assert two == 4 * (2 * (9216 + 4096) + 2 * (4096 + 4096) + 2 * 4096 + 4096 + 4096 + 2)


def test_groups_sum_their_parts_and_every_micro_batch_is_exchanged():
    one_group, two_groups = sent(2, parallel="hybrid"), sent(4, parallel="hybrid")
    assert two_groups["fc gradients"] == fc_parameters(1000, group_size=2) * 4
    assert two_groups["features"] == one_group["features"]
    twice = sent(4, parallel="hybrid", accum_steps=2)
    assert twice["features"] == 2 * two_groups["features"]
    assert twice["fc gradients"] == two_groups["fc gradients"]
    local = sent(4, parallel="hybrid", accum_steps=2, owt_scheme="b", fc_batch="local")
    assert local["fc gradients"] == 2 * 2 * two_groups["fc gradients"]
    assert local["loss"] == 2 * 2 * 2 * 6  # four turns of two numbers


def test_units_that_do_not_divide_are_distributed():
    first, last = (sent(3, index=i, parallel="hybrid", fc_group_size=3) for i in (0, 2))
    assert first["fc7 units"] == (4096 - 1366) * 96 * 4 and last["fc7 units"] == (4096 - 1365) * 96 * 4
    assert first["fc7 units back"] == 2 * 1366 * 96 * 4


def test_batch_normalised_nets_have_more_parameters_and_may_sum_their_moments():
    plain, normed = (sent(2, parallel="data", model=m) for m in ("alexnet-owt", "alexnet-owt-bn"))
    assert normed["conv gradients"] - plain["conv gradients"] == 2 * 1152 * 4
    assert normed["fc gradients"] - plain["fc gradients"] == 2 * 2 * 4096 * 4
    synced = sent(2, parallel="data", model="alexnet-owt-bn", sync_bn=True)
    assert synced.pop("batch norm") == 2 * 16 * (1152 + 2 * 4096)
    assert synced == normed


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("group_size", [2, 4, 8])
def test_at_the_break_even_batch_both_send_as_much(group_size, groups):
    batch = round(break_even_batch(group_size))
    both = {
        parallel: sent(
            groups * group_size, parallel=parallel, fc_group_size=group_size, batch=batch
        )
        for parallel in ("data", "hybrid")
    }  # fmt: skip
    assert sum(both["hybrid"].values()) == pytest.approx(sum(both["data"].values()), rel=2e-3)


def test_the_break_even_batch_shrinks_with_the_group():
    assert [round(break_even_batch(k)) for k in (2, 4, 8, 16)] == [2048, 1024, 512, 256]
