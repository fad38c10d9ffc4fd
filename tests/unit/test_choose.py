"""`parallel=auto` where there is nothing to measure."""

import logging

import pytest
import torch

from horovod_owt.config import resolve
from horovod_owt.parallel.choose import choose_parallel
from horovod_owt.parallel.runtime import World


@pytest.mark.parametrize(
    ("ranks", "settings", "why"),
    [
        (1, [], "one rank"),
        (4, [], "fc_group_size is 1: no ranks to split the layers over"),
        (4, ["precision=fp16", "fc_group_size=2"], "hybrid does not support fp16"),
    ],
)
def test_auto_is_data_where_hybrid_makes_no_sense(caplog, ranks, settings, why):
    cfg = resolve(None, ["parallel=auto", "fc_group_size=1", *settings])
    world = World(0, ranks, 0, ranks, "host", torch.device("cpu"), threads=1)
    with caplog.at_level(logging.INFO, logger="horovod_owt"):
        chosen, predicted_ms = choose_parallel(cfg, world)
    assert chosen.parallel == "data" and predicted_ms == {}
    assert caplog.messages == [f"parallel auto: data ({why})"]
