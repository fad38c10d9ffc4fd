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
from hybrid_plans import (
    BN,
    CLASSES,
    CLIP_NORM,
    EVALUATED,
    FP32_STEPS,
    IMAGES,
    LARS,
    PLANS,
    SKIP,
    STEPS,
    named,
    plan,
)
from one_process import assert_same, distance, first_gradient_norm, plain, plain_local, way_of
from real_ranks import PROGRAMS, launch
from safetensors.torch import load_file

from horovod_owt.model import alexnet_owt, build_model
from horovod_owt.model.alexnet_owt import FC6_IN
from horovod_owt.perf import network
from horovod_owt.perf.traffic import bytes_sent_per_step

sys.path.insert(0, str(PROGRAMS))
from train_random import HIDDEN, configure  # noqa: E402

pytestmark = pytest.mark.timeout(500)  # the first tests wait for the jobs


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
