"""The table of a step's kernels: all of the net's arithmetic is in it, and every kernel runs."""

import pytest
import torch

from horovod_owt.bench.layers import all_work, format_layers_report
from horovod_owt.config import TrainConfig
from horovod_owt.perf.layers import net_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "values",
    [{}, {"model": "alexnet-owt-bn"}, {"precision": "bf16", "dropout": 0.0}, {"channels_last": False}],
    ids=["plain", "batch norm", "bf16", "contiguous"],
)
def test_every_layers_arithmetic_is_in_the_table(values):
    cfg = TrainConfig(classes=10, image_size=64, batch=2, **values)
    works = list(all_work(cfg, CPU))
    for work in works:
        work.run()
    for layer in net_of(cfg.model, classes=10, image_size=64).layers():
        flops = {work.what: work.flops for work in works if work.layer == layer.name}
        assert flops.pop("forward") == 2 * layer.forward_flops
        assert sum(flops.values()) == 2 * layer.backward_flops
    kinds = {work.layer.rstrip("0123456789") for work in works}
    wanted = {"conv", "pool", "relu", "fc", "loss", "update"}
    wanted |= {"norm"} if cfg.model == "alexnet-owt-bn" else set()
    assert kinds == wanted | ({"dropout"} if cfg.dropout else set())


def test_a_convolutions_gradients_are_those_of_autograd():
    cfg = TrainConfig(classes=10, image_size=64, batch=2, precision="fp64")
    conv2 = {work.what: work.run for work in all_work(cfg, CPU) if work.layer == "conv2"}
    by_input, none, _ = conv2["by input"]()
    nothing, by_weight, by_bias = conv2["by weight"]()
    assert none is None and nothing is None
    assert by_input.shape == (2, 64, 7, 7) and by_weight.shape == (192, 64, 5, 5) and by_bias.shape == (192,)


def test_the_text_has_a_line_for_each_layer():
    rows = [
        {"layer": "conv1", "what": "forward", "ms": 2.0, "gflops": 50.0, "share": 0.5},
        {"layer": "conv1", "what": "by weight", "ms": 3.0, "gflops": 40.0, "share": 0.4},
        {"layer": "update", "what": "forward", "ms": 4.0},
    ]
    about = {"model": "alexnet-owt", "precision": "fp32", "ranks": 1, "batch_per_rank": 8, "image_size": 224}
    text = format_layers_report(
        {
            "rows": rows,
            "kernels_ms": 9.0,
            "step_ms": 10.0,
            "ceilings_gflops": {"conv": 100.0, "fc": 90.0},
            "method": {**about, "device": "cpu", "threads_per_rank": 1, "versions": {"torch": "2"}},
        }
    )
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert lines["conv1"] == ["2.0", "50.0", "50%", "3.0", "40.0", "40%"]
    assert lines["update"] == ["4.0"]
    assert "1.0 ms (10%) between the kernels" in text
