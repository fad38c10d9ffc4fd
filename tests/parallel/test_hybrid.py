"""Hybrid parallelism on real ranks, held against plain programs of one process.

One job of 2 ranks and one of 4 train all configurations. Where the arithmetic is to be the same, it is done
in fp64: there the order of additions changes nothing that could be taken for an error.
"""

import json
import shutil
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from real_ranks import PROGRAMS, launch
from safetensors.torch import load_file
from torch.nn import functional as F

from horovod_owt.model import alexnet_owt, build_model
from horovod_owt.model.alexnet_owt import FC6_IN
from horovod_owt.model.dropout import keep_scale, sample_keys
from horovod_owt.perf import network
from horovod_owt.perf.traffic import bytes_sent_per_step

sys.path.insert(0, str(PROGRAMS))
from train_random import AVERAGE, BAD, HIDDEN, configure, global_batch  # noqa: E402

pytestmark = pytest.mark.timeout(500)  # the first tests wait for the jobs

IMAGES, CLASSES = 8, 10  # of a global batch
LR = 0.02
SEED = 7
STEPS = 3  # what is wrong shows in the second already
FP32_STEPS = 6  # these are quicker


def plan(ranks: int, steps: int, **settings) -> dict:
    """A run of train_random.py on `ranks` ranks."""
    batch = IMAGES // ranks // settings.get("accum_steps", 1)
    defaults = dict(image_size=63, classes=CLASSES, dropout=0, lr=LR, seed=SEED, batch=batch)
    return {"steps": steps, "settings": defaults | settings}


def hybrid(ranks: int, steps: int, size: int, scheme: str, **settings) -> dict:
    return plan(ranks, steps, parallel="hybrid", fc_group_size=size, owt_scheme=scheme, **settings)


BN = dict(model="alexnet-owt-bn", precision="fp64")
SKIP = dict(bad_images="skip", precision="fp64", label_smoothing=0.1)
CLIP_NORM = 0.05
LARS = dict(optimizer="lars", lr=10.0, weight_decay=0.01, precision="fp64")
ON_2_RANKS = {
    "fp64-data": plan(2, STEPS, precision="fp64"),
    "fp64-a": hybrid(2, STEPS, 2, "a", precision="fp64"),
    "fp64-b": hybrid(2, STEPS, 2, "b", precision="fp64"),
    "fp64-a-accum": hybrid(2, STEPS, 2, "a", precision="fp64", accum_steps=2),
    "fp64-b-accum": hybrid(2, STEPS, 2, "b", precision="fp64", accum_steps=2),
    "fp32-data": plan(2, FP32_STEPS),
    "fp32-a": hybrid(2, FP32_STEPS, 2, "a"),
    "fp32-b": hybrid(2, FP32_STEPS, 2, "b"),
    "sync-bn-data": plan(2, STEPS, sync_bn=True, **BN),
    "sync-bn-a": hybrid(2, STEPS, 2, "a", sync_bn=True, **BN),
    "lars-data": plan(2, STEPS, **LARS),
    "lars-a": hybrid(2, STEPS, 2, "a", **LARS),
    "average-data": plan(2, STEPS, sync_bn=True, ema=0.5, **BN),
    "average-a": hybrid(2, STEPS, 2, "a", sync_bn=True, ema=0.5, **BN),
    "dropout-data": plan(2, STEPS, precision="fp64", dropout=0.5, accum_steps=2),
    "dropout-a": hybrid(2, STEPS, 2, "a", precision="fp64", dropout=0.5),
    "dropout-b-accum": hybrid(2, STEPS, 2, "b", precision="fp64", dropout=0.5, accum_steps=2),
    "local": hybrid(2, STEPS, 2, "b", precision="fp64", fc_batch="local"),
    "bf16-data": plan(2, STEPS, precision="bf16"),
    "bf16-a": hybrid(2, STEPS, 2, "a", precision="bf16"),
    "bf16-b": hybrid(2, STEPS, 2, "b", precision="bf16"),
    "compressed-data": plan(2, STEPS, compression="fp16"),
    "one-bit": plan(2, FP32_STEPS, compression="onebit"),
    "low-rank": plan(2, FP32_STEPS, compression="powersgd:4"),
    "compressed": hybrid(2, STEPS, 2, "a", compression="fp16"),
    "clipped-data": plan(2, STEPS, precision="fp64", clip_norm=CLIP_NORM),
    "clipped-a": hybrid(2, STEPS, 2, "a", precision="fp64", clip_norm=CLIP_NORM),
    "skip-data": plan(2, STEPS, **SKIP),
    "skip-a": hybrid(2, STEPS, 2, "a", **SKIP),
    "skip-b-accum": hybrid(2, STEPS, 2, "b", accum_steps=2, **SKIP),
    "skip-local": hybrid(2, STEPS, 2, "b", fc_batch="local", **SKIP),
}
ON_4_RANKS = {
    **{
        f"fp64-{name}-{scheme}": hybrid(4, STEPS, size, scheme, precision="fp64")
        for name, size in (("one-group", 4), ("2x2", 2))
        for scheme in "ab"
    },
    **{
        f"fp32-{name}-{scheme}": hybrid(4, FP32_STEPS, size, scheme)
        for name, size in (("one-group", 4), ("2x2", 2))
        for scheme in "ab"
    },
    "fp64-2x2-accum": hybrid(4, STEPS, 2, "a", precision="fp64", accum_steps=2),
    "sync-bn-one-group": hybrid(4, STEPS, 4, "a", sync_bn=True, **BN),
    "sync-bn-2x2": hybrid(4, STEPS, 2, "a", sync_bn=True, **BN),
    "lars-2x2": hybrid(4, STEPS, 2, "b", **LARS),
    "average-2x2": hybrid(4, STEPS, 2, "a", sync_bn=True, ema=0.5, **BN),
    "average-bn-data": plan(4, STEPS, ema=0.5, **BN),
    "average-bn-2x2-b": hybrid(4, STEPS, 2, "b", ema=0.5, **BN),
    "bn-data": plan(4, STEPS, **BN),
    "bn-one-group-a": hybrid(4, STEPS, 4, "a", **BN),
    "bn-2x2-b": hybrid(4, STEPS, 2, "b", **BN),
    "dropout-one-group": hybrid(4, STEPS, 4, "a", precision="fp64", dropout=0.5),
    "dropout-2x2": hybrid(4, STEPS, 2, "b", precision="fp64", dropout=0.5),
    "local-2x2": hybrid(4, STEPS, 2, "b", precision="fp64", fc_batch="local"),
    "local-2x2-compressed": hybrid(4, STEPS, 2, "b", fc_batch="local", compression="fp16"),
    "bf16-2x2": hybrid(4, STEPS, 2, "b", precision="bf16"),
    "2-classes": hybrid(4, STEPS, 4, "a", precision="fp64", classes=2),
    "clipped-2x2": hybrid(4, STEPS, 2, "b", precision="fp64", clip_norm=CLIP_NORM),
    "skip-2x2": hybrid(4, STEPS, 2, "b", **SKIP),
    "skip-local-2x2": hybrid(4, STEPS, 2, "b", fc_batch="local", **SKIP),
}
PLANS = {2: ON_2_RANKS, 4: ON_4_RANKS}
EVALUATED = {
    2: ["fp64-a", "sync-bn-data", "sync-bn-a", "average-data", "average-a"],
    4: ["bn-data", "bn-2x2-b", "fp32-2x2-a", "average-2x2"],
}


class Trained:
    """What a job left behind: weights and records by name."""

    def __init__(self, folder) -> None:
        self.folder = folder

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def record(self, name: str) -> dict:
        return json.loads((self.folder / f"{name}.json").read_text())

    def losses(self, name: str) -> list[float]:
        return self.record(name)["losses"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The jobs, each started when the first test asks for it: by number of ranks."""
    root = tmp_path_factory.mktemp("trained")

    @cache
    def on(ranks: int) -> Trained:
        out = root / str(ranks)
        out.mkdir()
        evaluated = EVALUATED[ranks]
        runs = [{"name": n, "evaluate": n in evaluated, **plan} for n, plan in PLANS[ranks].items()]
        argv = ["python", PROGRAMS / "train_random.py", out, json.dumps(runs)]
        with launch(argv, ranks=ranks) as job:
            done = job.finish(limit_s=400)
        assert done.exit_code == 0, f"{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
        return Trained(out)

    yield on
    shutil.rmtree(root)  # 30 MB a run


@pytest.fixture(autouse=True)
def few_units(monkeypatch):
    """The plain programs' nets have as many units as train_random's."""
    monkeypatch.setattr(alexnet_owt, "HIDDEN", HIDDEN)


def sgd(parameters, cfg, lr: float | None = None) -> torch.optim.SGD:
    if cfg.optimizer == "lars":  # the step is in the gradients
        return torch.optim.SGD(parameters, lr=1.0, momentum=cfg.momentum)
    return torch.optim.SGD(parameters, lr=lr or cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay)


def weights_of(net) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in net.state_dict().items()}


def net_for(cfg):
    """The whole net with the same first weights; it leaves dropout to the programs below."""
    net = build_model(cfg.model, cfg.classes, dropout=0.0, seed=cfg.seed)
    return (net.double() if cfg.precision == "fp64" else net).train()


@cache
def plain(steps: int, *, masked: float = 0.0, **settings) -> tuple[list[float], dict[str, torch.Tensor]]:
    """One process, the whole net, the whole global batch at once, autograd and torch's SGD.

    `masked` is a share of dropout, its masks those of the samples' places in the stream.
    """
    cfg = configure(plan(1, steps, **settings)["settings"])
    net = net_for(cfg)
    optimizer, losses = sgd(net.parameters(), cfg), []
    floats = {name: tensor for name, tensor in net.state_dict().items() if tensor.is_floating_point()}
    averages = {name: tensor.clone() for name, tensor in floats.items()} if cfg.ema else {}
    for step in range(steps):
        images, labels = global_batch(step, IMAGES, cfg.classes)
        good = good_rows(step, cfg)
        images, labels = images[good], labels[good]
        features = net.convolve(images.to(next(net.parameters()).dtype))
        if masked:
            positions = torch.arange(step * IMAGES, (step + 1) * IMAGES).numpy()
            keys = torch.from_numpy(sample_keys(cfg.seed, positions))
            _, fc6, relu, _, *rest = net.classifier
            hidden = relu(fc6(features * keep_scale(keys, 0, range(FC6_IN), masked)))
            logits = torch.nn.Sequential(*rest)(hidden * keep_scale(keys, 1, range(HIDDEN), masked))
        else:
            logits = net.classifier(features)
        optimizer.zero_grad()
        loss = F.cross_entropy(logits, labels, label_smoothing=cfg.label_smoothing)
        loss.backward()
        if cfg.clip_norm:
            norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
            assert norm > cfg.clip_norm, "nothing to clip"
            for parameter in net.parameters():  # torch's clip_grad_norm_ adds 1e-6 to the norm
                parameter.grad *= cfg.clip_norm / norm
        if cfg.optimizer == "lars":
            for p in net.parameters():
                size, decay = p.detach().norm(), cfg.weight_decay
                rate = cfg.lars_eta * size / (p.grad.norm() + decay * size)
                p.grad = cfg.lr * rate * (p.grad + decay * p.detach())
        optimizer.step()
        for name, average in averages.items():
            averages[name] = cfg.ema * average + (1 - cfg.ema) * floats[name]
        losses.append(loss.item())
    return losses, weights_of(net) | {f"{AVERAGE}{name}": average for name, average in averages.items()}


def first_gradient_norm() -> float:
    """Of the whole net's, before anything is clipped."""
    cfg = configure(plan(1, 1, precision="fp64")["settings"])
    net, (images, labels) = net_for(cfg), global_batch(0, IMAGES, CLASSES)
    F.cross_entropy(net(images.double()), labels).backward()
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()]).norm().item()


def good_rows(step: int, cfg) -> list[int]:
    """Of the global batch, when some of it is bad."""
    return [row for row in range(IMAGES) if cfg.bad_images == "fail" or row not in BAD.get(step, [])]


@cache
def plain_local(
    steps: int, *, ranks: int, size: int, **settings
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The paper's variable batch size as a sequence: one process, classifier updates in `size` turns a step.

    In turn k the classifier sees the sub-batch of the k-th rank of every group and is updated by their mean
    gradient, with the learning rate of a batch so much smaller. The features' gradients are those of the
    weights before that update; the convolutions are updated last, by the mean over the global batch. Bad
    images are in neither mean, and a turn without a good one is no update.
    """
    cfg = configure(plan(1, steps, **{"precision": "fp64", **settings})["settings"])
    net = net_for(cfg)
    share, batch = 1 / size, IMAGES // ranks
    fc_optimizer = sgd(net.classifier.parameters(), cfg, lr=cfg.lr * share)
    conv_optimizer, losses = sgd(net.features.parameters(), cfg), []
    for step in range(steps):
        images, labels = global_batch(step, IMAGES, cfg.classes)
        features = net.convolve(images.double())
        d_features, step_loss, good = torch.zeros_like(features), 0.0, good_rows(step, cfg)
        for turn in range(size):
            takers = range(turn, ranks, size)
            rows = [row for rank in takers for row in range(rank * batch, (rank + 1) * batch) if row in good]
            if not rows:
                continue
            own = features[rows].detach().requires_grad_()
            loss = F.cross_entropy(net.classifier(own), labels[rows], label_smoothing=cfg.label_smoothing)
            fc_optimizer.zero_grad()
            loss.backward()
            fc_optimizer.step()
            d_features[rows] = own.grad * len(rows) / len(good)
            step_loss += loss.item() * len(rows) / len(good)
        conv_optimizer.zero_grad()
        features.backward(d_features)
        conv_optimizer.step()
        losses.append(step_loss)
    return losses, weights_of(net)


def assert_same(ours: dict, theirs: dict, tolerance: float) -> None:
    """Each tensor's distance is at most `tolerance` of its length."""
    assert ours.keys() == theirs.keys()
    far = {}
    for name, wanted in theirs.items():
        assert ours[name].shape == wanted.shape
        wanted = wanted.double()
        # a bias before a normalisation has no gradient but rounding: there is no length to compare with
        distance = (ours[name].double() - wanted).norm() / wanted.norm().clamp(min=1e-6)
        if not distance <= tolerance:
            far[name] = distance.item()
    assert not far


def distance(ours: dict, theirs: dict) -> float:
    """Euclidean, over all tensors."""
    return sum((ours[n].double() - theirs[n].double()).square().sum().item() for n in theirs) ** 0.5


def way_of(weights: dict) -> float:
    """How far these have gone from the first weights."""
    return distance(net_for(configure(plan(1, 0)["settings"])).state_dict(), weights)


def named(prefix: str, chosen=PLANS) -> list[tuple[int, str]]:
    return [(ranks, name) for ranks, plans in chosen.items() for name in plans if name.startswith(prefix)]


@pytest.mark.parametrize(("ranks", "name"), named("fp64"))
def test_ranks_train_to_the_weights_of_one_process(trained, ranks, name):
    losses, weights = plain(PLANS[ranks][name]["steps"], precision="fp64")
    job = trained(ranks)
    assert job.losses(name) == pytest.approx(losses, rel=1e-6)  # they are reported in fp32
    assert_same(job.weights(name), weights, 1e-9)


@pytest.mark.parametrize(("ranks", "name"), named("fp32"))
def test_in_fp32_the_weights_are_near_those_of_one_process(trained, ranks, name):
    """Within 1e-5, and 1e-7 is usual; but not for every seed, nor for certain with another torch.

    An input of a rectifier or a pool that ties within rounding lets its gradient go the other way, and then
    some biases are off by 1e-4. It happened with 5 of 11 seeds, in single processes too whose convolutions
    add up in another order. That nothing else is behind such a distance is what fp64 shows above.
    """
    losses, weights = plain(FP32_STEPS)
    job = trained(ranks)
    assert job.losses(name) == pytest.approx(losses, rel=1e-5)
    assert_same(job.weights(name), weights, 1e-5)


@pytest.mark.parametrize(("ranks", "name"), named("sync-bn"))
def test_with_sync_bn_the_batch_is_normalised_as_one_process_does(trained, ranks, name):
    losses, weights = plain(STEPS, **BN)
    job = trained(ranks)
    assert job.losses(name) == pytest.approx(losses, rel=1e-6)
    assert_same(job.weights(name), weights, 1e-7)


@pytest.mark.parametrize(("ranks", "name"), named("lars"))
def test_lars_has_the_norms_of_whole_layers(trained, ranks, name):
    losses, weights = plain(STEPS, **LARS)
    job = trained(ranks)
    assert job.losses(name) == pytest.approx(losses, rel=1e-6)
    assert_same(job.weights(name), weights, 1e-9)


@pytest.mark.parametrize(("ranks", "name"), [(2, "average-data"), (2, "average-a"), (4, "average-2x2")])
def test_the_moving_average_of_the_weights_is_that_of_one_process(trained, ranks, name):
    """Of the running statistics, too."""
    losses, weights = plain(STEPS, sync_bn=True, ema=0.5, **BN)
    ours = trained(ranks).weights(name)
    assert "average.classifier.2.running_var" in ours and "average.classifier.1.weight" in ours
    assert_same(ours, weights, 1e-7)
    without = plain(STEPS, **BN)[1]
    assert_same({name: ours[name] for name in without}, without, 1e-7)


def test_the_average_of_each_ranks_running_statistics_is_the_same_in_hybrid(trained):
    assert_same(trained(4).weights("average-bn-2x2-b"), trained(4).weights("average-bn-data"), 1e-7)


@pytest.mark.parametrize("name", ["bn-one-group-a", "bn-2x2-b"])
def test_without_sync_bn_each_ranks_batch_is_normalised_as_in_data_parallel(trained, name):
    """Running statistics too. That these differ from the whole batch's shows that the test sees something."""
    job = trained(4)
    data = job.weights("bn-data")
    assert job.losses(name) == pytest.approx(job.losses("bn-data"), rel=1e-6)
    assert_same(job.weights(name), data, 1e-7)
    synced = job.weights("sync-bn-2x2")
    for running in ("features.1.running_var", "classifier.2.running_var"):
        assert (data[running] - synced[running]).norm() > 1e-3 * data[running].norm()


@pytest.mark.parametrize(("ranks", "name"), named("dropout"))
def test_dropout_belongs_to_sample_and_unit(trained, ranks, name):
    losses, weights = plain(STEPS, precision="fp64", masked=0.5)
    job = trained(ranks)
    assert job.losses(name) == pytest.approx(losses, rel=1e-6)
    assert_same(job.weights(name), weights, 1e-9)


@pytest.mark.parametrize(("ranks", "name"), named("clipped"))
def test_a_clipped_gradient_is_that_of_one_process(trained, ranks, name):
    """Though no rank has the whole of it, and some numbers of it are on several. Its first length is told."""
    losses, weights = plain(STEPS, precision="fp64", clip_norm=CLIP_NORM)
    job = trained(ranks)
    assert job.losses(name) == pytest.approx(losses, rel=1e-6)
    norms = job.record(name)["norms"]
    assert len(norms) == STEPS and norms[0] == pytest.approx(first_gradient_norm(), rel=1e-6)
    assert_same(job.weights(name), weights, 1e-9)


@pytest.mark.parametrize(("ranks", "name"), [(2, "local"), (4, "local-2x2")])
def test_fc_batch_local_is_a_sequence_of_smaller_updates(trained, ranks, name):
    losses, weights = plain_local(STEPS, ranks=ranks, size=2)
    job = trained(ranks)
    assert job.losses(name) == pytest.approx(losses, rel=1e-6)
    assert_same(job.weights(name), weights, 1e-9)
    at_once = plain(STEPS, precision="fp64")[1]
    assert distance(weights, at_once) > 1e-3 * way_of(at_once)


@pytest.mark.parametrize(("ranks", "name"), named("skip"))
def test_bad_images_weigh_nothing(trained, ranks, name):
    """The weights of a program that has only the good ones, whole ranks and turns of bad ones included."""
    if "local" in name:
        losses, weights = plain_local(STEPS, ranks=ranks, size=2, **SKIP)
    else:
        losses, weights = plain(STEPS, **SKIP)
    assert trained(ranks).losses(name) == pytest.approx(losses, rel=1e-6)
    assert_same(trained(ranks).weights(name), weights, 1e-9)
    with_all = plain(STEPS, **SKIP | {"bad_images": "fail"})[1]
    assert distance(weights, with_all) > 1e-2 * way_of(with_all)


def test_ranks_without_a_class_of_their_own_train_too(trained):
    losses, weights = plain(STEPS, precision="fp64", classes=2)
    assert trained(4).losses("2-classes") == pytest.approx(losses, rel=1e-6)
    assert_same(trained(4).weights("2-classes"), weights, 1e-9)


@pytest.mark.parametrize(
    ("ranks", "name", "tolerance"),
    [
        (2, "bf16-data", 0.12),
        (2, "bf16-a", 0.12),
        (2, "bf16-b", 0.12),
        (4, "bf16-2x2", 0.12),
        (2, "compressed-data", 0.001),
        (2, "compressed", 0.001),
        (4, "local-2x2-compressed", 0.001),
    ],
)
def test_fewer_bits_train_to_nearly_the_same_weights(trained, ranks, name, tolerance):
    """Losses hardly differ so early: the distance is held against the way that the weights went."""
    local = "local" in name
    losses, weights = plain_local(STEPS, ranks=4, size=2) if local else plain(STEPS)
    assert trained(ranks).losses(name) == pytest.approx(losses, rel=0.01)
    off = distance(trained(ranks).weights(name), weights) / way_of(weights)
    assert tolerance / 50 < off < tolerance  # the lower bound: fewer bits there are


def closed_form(ranks: int, size: int, batch: int, *, word: int = 4, gradient: int = 4) -> dict[str, float]:
    """Bytes that a rank sends and receives in one step, the mean over ranks, by what they carry (design.md).

    `word` bytes hold a number of features and units, `gradient` bytes one of the weights' gradients.
    """
    net = build_model("alexnet-owt", CLASSES)
    conv, fc = (sum(p.numel() for p in part.parameters()) for part in (net.features, net.classifier))
    peers, groups = size - 1, ranks // size
    expected = {
        "features": peers * batch * FC6_IN * word,
        "features back": peers * batch * FC6_IN * word,
        "fc7 units": peers * batch * HIDDEN * word,
        "fc7 units back": peers * batch * HIDDEN * word,
        "labels": peers * batch * 8,
        "logits": 2 * peers / size * size * batch * CLASSES * 4,
        "conv gradients": 2 * (ranks - 1) / ranks * conv * gradient,
        "fc gradients": 2 * (groups - 1) / groups * fc / size * gradient,
        "step facts": 2
        * (ranks - 1)
        / ranks
        * 4
        * (5 + 3 * ranks),  # loss, counts, whether to stop or save; times
    }
    return {what: number for what, number in expected.items() if number}


@pytest.mark.parametrize(
    ("ranks", "name", "size", "width"),
    [
        (2, "fp32-data", 1, {}),
        (2, "fp32-a", 2, {}),
        (2, "fp32-b", 2, {}),
        (4, "fp32-one-group-a", 4, {}),
        (4, "fp32-one-group-b", 4, {}),
        (4, "fp32-2x2-a", 2, {}),
        (4, "fp32-2x2-b", 2, {}),
        (2, "bf16-a", 2, {"word": 2}),
        (2, "compressed", 2, {"gradient": 2}),
    ],
)
def test_bytes_are_those_of_the_closed_form(trained, ranks, name, size, width):
    expected = closed_form(ranks, size, IMAGES // ranks, **width)
    by_rank = trained(ranks).record(name)["traffic"]
    assert len(by_rank) == ranks
    for way in ("sent", "received"):
        assert all(traffic[way].keys() == expected.keys() for traffic in by_rank)
        mean = {what: sum(traffic[way][what] for traffic in by_rank) / ranks for what in expected}
        assert mean == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("name", "compression"), [("one-bit", "onebit"), ("low-rank", "powersgd:4")])
def test_compressed_gradients_take_the_bytes_that_the_planner_has(trained, monkeypatch, name, compression):
    monkeypatch.setattr(network, "HIDDEN", HIDDEN)
    cfg = configure(plan(2, 1, compression=compression)["settings"])
    expected = bytes_sent_per_step(cfg, 2)
    assert (
        expected["fc gradients"]
        < 0.1 * bytes_sent_per_step(replace(cfg, compression="none"), 2)["fc gradients"]
    )
    for traffic in trained(2).record(name)["traffic"]:
        assert traffic["sent"] == traffic["received"] == expected


@pytest.mark.parametrize("name", ["one-bit", "low-rank"])
def test_compressed_gradients_train_about_as_whole_ones_do(trained, name):
    whole, ours = trained(2).losses("fp32-data"), trained(2).losses(name)
    assert ours[0] == whole[0] and ours[1:] != whole[1:]
    assert ours == pytest.approx(whole, rel=0.05)


def test_compressed_sums_lose_nothing_and_low_rank_is_that_of_torch(trained):
    found = json.loads((trained(2).folder / "compression.json").read_text())
    assert found.keys() == {"torch", "onebit", "powersgd:2"} and all(off < 1e-5 for off in found.values()), (
        found
    )


@pytest.mark.parametrize(("ranks", "size"), [(2, 2), (4, 2), (4, 4)])
def test_what_goes_back_is_the_mirror_image_of_what_went_forward(trained, ranks, size):
    """<forward(x), y> = <x, backward(y)> over all ranks: the property that defines a gradient's way back."""
    found = json.loads((trained(ranks).folder / "exchange.json").read_text())[str(size)]
    products = {what: pair for what, pair in found.items() if isinstance(pair, list)}
    assert products.keys() == {"rows", "units", "everywhere", *(f"lend {owner}" for owner in range(size))}
    for what, (forward, back) in products.items():
        assert abs(forward) > 1e-3 and back == pytest.approx(forward, rel=1e-12), what
    unequal = {what: count for what, count in found.items() if what not in products}
    assert unequal == {what: 0 for what in ("whole tensors", "bf16 rows", "bf16 lent", "bf16 sums")}


@pytest.mark.parametrize(
    ("ranks", "name"), [(ranks, name) for ranks in EVALUATED for name in EVALUATED[ranks]]
)
def test_what_is_evaluated_is_what_a_checkpoint_holds(trained, ranks, name):
    """Running statistics too: a net loaded from the gathered tensors gives the same logits."""
    assert trained(ranks).record(name)["evaluation_is_off_by"] < 1e-5
