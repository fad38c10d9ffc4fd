"""The update that a GPU decides on does what the host's decision does: here both on the CPU."""

import copy
import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from horovod_owt.config import TrainConfig
from horovod_owt.data.batch import Batch
from horovod_owt.model import alexnet_owt
from horovod_owt.parallel.runtime import World
from horovod_owt.train.replica import MOMENTUM, BadBatch, Replica
from horovod_owt.train.update import divisor, skip_flag

BATCH = 4
CONFIG = TrainConfig(classes=3, image_size=63, batch=BATCH, fc_group_size=1, dropout=0.0)
TURNS = dict(parallel="hybrid", owt_scheme="b", fc_batch="local")
NO_FUSED_SGD = "fused" not in inspect.signature(torch.optim.SGD).parameters
ROOT = World(0, 1, 0, 1, "here", torch.device("cpu"), 1)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(alexnet_owt, "HIDDEN", 10)


def random_batch(seed: int, *, bad: int = 0, value: float | None = None) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(BATCH, 3, 63, 63, generator=draw)
    if value is not None:
        images[0, 0, 0, 0] = value
    labels = torch.randint(3, (BATCH,), generator=draw)
    labels[:bad] = -100
    return Batch(images, labels, labels >= 0, np.arange(BATCH), {row: "bad" for row in range(bad)})


def replica(*, decides: bool, **settings) -> Replica:
    if decides and NO_FUSED_SGD:
        pytest.skip("this torch has no fused SGD: the host decides, on GPUs too")
    made = Replica(replace(CONFIG, **settings), ROOT)
    made._skips_on_device = decides
    return made


def weights(made: Replica) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor, _ in made.state_tensors()}


def step(made: Replica, batch: Batch):
    return made.train_step(lambda: batch, consumed=0, lr=0.1)


@pytest.mark.parametrize(
    "settings",
    [{}, dict(bad_images="skip"), dict(clip_norm=0.5), dict(clip_norm=0.5, bad_images="skip"), TURNS],
    ids=["plain", "bad images", "clipped", "clipped, bad images", "turns"],
)
def test_both_ways_train_to_the_same_weights(settings):
    bad = 1 if "bad_images" in settings else 0
    made = [replica(decides=decides, **settings) for decides in (False, True)]
    for seed in range(3):
        host, device = (step(each, random_batch(seed, bad=bad)) for each in made)
        assert device.loss == pytest.approx(host.loss, rel=1e-6) and device.bad_images == bad
        if host.grad_norm is not None:
            assert device.grad_norm == pytest.approx(host.grad_norm, rel=1e-5)
    host, device = map(weights, made)
    for name, tensor in host.items():
        torch.testing.assert_close(device[name], tensor, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("settings", [{}, dict(bad_images="skip"), dict(clip_norm=0.5), TURNS])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_no_weight(settings, value):
    made = replica(decides=True, **settings)
    step(made, random_batch(0))
    before = weights(made)
    with pytest.raises(FloatingPointError):
        step(made, random_batch(1, value=value))
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(made).items())
    step(made, random_batch(2))  # the next one is not skipped
    assert not torch.equal(weights(made)["features.0.weight"], before["features.0.weight"])


@pytest.mark.parametrize(("tolerance", "bad"), [("fail", 1), ("skip", BATCH)])
def test_bad_images_that_end_the_run_change_no_weight(tolerance, bad):
    made = replica(decides=True, bad_images=tolerance)
    before = weights(made)
    with pytest.raises(BadBatch):
        step(made, random_batch(0, bad=bad))
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(made).items())


@pytest.mark.parametrize(
    ("loss", "bad", "norm", "skipped"),
    [
        (1.0, 0, None, 0.0),
        (1.0, 2, None, 0.0),
        (1.0, 3, None, 1.0),
        (math.nan, 0, None, 1.0),
        (-math.inf, 0, None, 1.0),
        (1.0, 0, 2.0, 0.0),
        (1.0, 0, math.inf, 1.0),
    ],
)
def test_the_flag_is_what_a_fused_optimizer_compares_with_1(loss, bad, norm, skipped):
    norm = None if norm is None else torch.tensor([norm], dtype=torch.float64)
    flag = skip_flag(torch.tensor(loss), torch.tensor(float(bad)), max_bad=2, norm=norm)
    assert flag.dtype == torch.float32 and flag.item() == skipped


def test_a_norm_below_the_limit_is_not_scaled_up():
    norm = torch.tensor([0.1], dtype=torch.float64)
    assert divisor(torch.tensor(0.0), 8, norm=norm, clip_norm=1.0).item() == 1
    assert divisor(torch.tensor(2.0), 8, norm=norm, clip_norm=1.0).item() == 0.75
    assert divisor(torch.tensor(2.0), 8, norm=40 * norm, clip_norm=1.0).item() == 4


def test_gradients_are_scaled_even_if_only_the_good_images_exceed_the_limit():
    """The norm over the good half is twice that over all images."""
    norm = torch.tensor([0.75], dtype=torch.float64)
    assert divisor(torch.tensor(4.0), 8, norm=norm, clip_norm=1.0).item() == 0.75


@pytest.mark.parametrize("settings", [{}, TURNS], ids=["plain", "turns"])
def test_after_a_reset_of_the_momentum_a_step_is_that_of_a_new_optimizer(settings):
    used, new = (replica(decides=False, momentum=0.9, **settings) for _ in range(2))
    step(used, random_batch(1))
    for name, tensor, _ in new.state_tensors():
        if not name.startswith(MOMENTUM):
            tensor.copy_(dict((n, t) for n, t, _ in used.state_tensors())[name])
    new.weights_changed()
    used.reset_momentum()
    for made in (used, new):
        step(made, random_batch(2))
    torch.testing.assert_close(weights(used), weights(new), rtol=0, atol=0)


def test_the_weight_decay_of_a_step_is_in_its_update():
    made = [replica(decides=False, momentum=0.0) for _ in range(2)]
    before = weights(made[0])
    for each, decay in zip(made, (0.0, 0.5), strict=True):
        each.train_step(lambda: random_batch(1), consumed=0, lr=0.1, weight_decay=decay)
    without, decayed = map(weights, made)
    for name, _, _ in made[0].strategy.named_parameters():
        torch.testing.assert_close(decayed[name], without[name] - 0.1 * 0.5 * before[name])


@pytest.mark.parametrize("model", ["alexnet-owt", "alexnet-owt-bn"])
def test_lars_is_the_rule_of_the_paper(model):
    """With the learning rate inside the momentum: it changes from step to step here."""
    settings = dict(model=model, optimizer="lars", lars_eta=0.01, weight_decay=0.1, precision="fp64")
    made = replica(decides=False, **settings)
    plain, eta, decay, momentum = copy.deepcopy(made.strategy.model).train(), 0.01, 0.1, 0.9
    velocity = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    for number, lr in enumerate((2.0, 3.0, 0.5)):
        batch = random_batch(number)
        made.train_step(lambda batch=batch: batch, consumed=0, lr=lr)
        plain.zero_grad()
        torch.nn.functional.cross_entropy(plain(batch.images.double()), batch.labels).backward()
        with torch.no_grad():
            for name, w in plain.named_parameters():
                size, slope = w.norm(), w.grad.norm()
                rate = eta * size / (slope + decay * size) if size > 0 and slope > 0 else 1.0
                velocity[name] = momentum * velocity[name] + lr * rate * (w.grad + decay * w)
                w -= velocity[name]
    ours = weights(made)
    for name, w in plain.named_parameters():
        torch.testing.assert_close(ours[name], w.detach(), rtol=1e-6, atol=1e-6)
