"""How torch's GPU libraries compute: in whole fp32 and tuned, before anything is timed, too."""

from types import SimpleNamespace

import pytest
import torch

from horovod_owt.bench import ceilings
from horovod_owt.config import TrainConfig
from horovod_owt.inference.evaluate import logits_of
from horovod_owt.model import alexnet_owt
from horovod_owt.model.alexnet_owt import AlexNetOWT
from horovod_owt.parallel import parts
from horovod_owt.parallel.runtime import World
from horovod_owt.train.replica import Replica

CONFIG = TrainConfig(classes=3, image_size=63, batch=2, fc_group_size=1)
WORLD = World(0, 1, 0, 1, "here", torch.device("cpu"), 1)


def tf32() -> tuple[bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def set_flags(cudnn: bool, matmul: bool, benchmark: bool) -> None:
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = cudnn, matmul
    torch.backends.cudnn.benchmark = benchmark


@pytest.fixture(autouse=True)
def in_a_container_of_nvidia(monkeypatch):
    """Where TORCH_ALLOW_TF32_CUBLAS_OVERRIDE is 1."""
    monkeypatch.setattr(alexnet_owt, "HIDDEN", 10)
    before = *tf32(), torch.backends.cudnn.benchmark
    set_flags(True, True, False)
    yield
    set_flags(*before)


def test_training_is_in_whole_fp32():
    Replica(CONFIG, WORLD)
    assert tf32() == (False, False) and torch.backends.cudnn.benchmark


def test_evaluation_is_in_whole_fp32():
    logits_of(AlexNetOWT(3), CONFIG)
    assert tf32() == (False, False)


@pytest.mark.parametrize(
    ("module", "first", "measure"),
    [
        (parts, "time_convolutions", lambda: parts.measure_parts(CONFIG, WORLD, {"data": 1})),
        (
            ceilings,
            "_ring",
            lambda: ceilings._measure(SimpleNamespace(cfg=CONFIG), WORLD, None, None, steps=1),
        ),
    ],
    ids=["auto", "ceilings"],
)
def test_what_is_measured_before_a_step_computes_as_the_step(monkeypatch, module, first, measure):
    class Measuring(Exception):
        pass

    def look(*_):
        assert tf32() == (False, False) and torch.backends.cudnn.benchmark
        raise Measuring

    monkeypatch.setattr(module, first, look)
    with pytest.raises(Measuring):
        measure()
