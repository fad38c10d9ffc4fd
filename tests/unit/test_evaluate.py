"""Evaluation against a plain loop: the same pixels, the same counts, class by class."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import CenterCrop, Compose, Lambda, Normalize, Resize, TenCrop, ToTensor

from horovod_owt.config import resolve
from horovod_owt.data.batch import MEAN, STD
from horovod_owt.data.store import open_data_set, open_validation_set
from horovod_owt.data.synthetic import write_synthetic
from horovod_owt.errors import ConfigError, DataError
from horovod_owt.inference.confusion import check_confusion, plot_confusion
from horovod_owt.inference.evaluate import VIEWS, check_classes, logits_of, rows_of, scores_of
from horovod_owt.inference.outcomes import Outcomes, format_report, summary
from horovod_owt.inference.request import prepare_evaluation
from horovod_owt.inference.weights import ModelInfo
from horovod_owt.model import alexnet_owt, build_model
from horovod_owt.parallel.runtime import World
from horovod_owt.train.evaluate import places
from horovod_owt.train.pipelines import validation_pipeline

pytestmark = pytest.mark.timeout(120)
SIDE = 64
ALONE = World(0, 1, 0, 1, "here", torch.device("cpu"), threads=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "set"
    write_synthetic(root, classes=8, train_per_class=1, val_per_class=6, size=(70, 110), workers=1)
    return root


@pytest.fixture(scope="module")
def model(data):
    """A net of random weights that takes some images for each class."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alexnet_owt, "HIDDEN", 98)
        net = build_model("alexnet-owt", 8, seed=3).eval()
    for parameter in net.parameters():
        parameter.data.mul_(2.5)
    usual = Compose([Resize(73), CenterCrop(SIDE), ToTensor(), Normalize(MEAN, STD)])
    paths = sorted((data / "val").glob("*/*"))
    images = torch.stack([usual(Image.open(path).convert("RGB")) for path in paths])
    with torch.no_grad():
        logits = net(images)
        net.classifier[-1].bias -= logits.mean(0)
    return net


def plain_loop(model, root: Path, crops: int) -> dict:
    """As a torchvision user would write it."""
    normalise = Compose([ToTensor(), Normalize(MEAN, STD)])
    cut = Lambda(lambda image: [CenterCrop(SIDE)(image)]) if crops == 1 else TenCrop(SIDE)
    classes = sorted(folder.name for folder in (root / "val").iterdir())
    hits1, hits5, losses, by_class, confusion = 0, 0, [], [0] * len(classes), np.zeros((8, 8), int)
    for label, name in enumerate(classes):
        for path in sorted((root / "val" / name).iterdir()):
            image = Resize(round(SIDE * 256 / 224))(Image.open(path).convert("RGB"))
            with torch.no_grad():
                logits = model(torch.stack([normalise(crop) for crop in cut(image)]))
            probabilities = logits.double().softmax(1).mean(0)
            best = probabilities.argsort(descending=True).tolist()
            hits1, hits5 = hits1 + (best[0] == label), hits5 + (label in best[:5])
            by_class[label] += best[0] == label
            confusion[label, best[0]] += 1
            losses.append(-probabilities[label].log().item())
    return {
        "correct_top1": hits1,
        "correct_top5": hits5,
        "loss": sum(losses) / len(losses),
        "by_class": by_class,
        "confusion": confusion.tolist(),
    }


def evaluated(model, root: Path, crops: int, *settings: str, world: World = ALONE) -> list:
    cfg = resolve(None, (f"image_size={SIDE}", "batch=7", *settings))
    images = open_validation_set(root)
    with validation_pipeline(cfg, images, world, view=VIEWS[crops]) as batches:
        return list(rows_of(batches, logits_of(model, cfg), crops))


@pytest.mark.parametrize("crops", [1, 10])
def test_counts_are_those_of_a_plain_loop(data, model, crops):
    images = open_validation_set(data)
    outcomes = Outcomes.of(evaluated(model, data, crops, "pipeline=torchvision"), images.labels)
    found, plain = summary(outcomes, images.classes, images.classes, 5), plain_loop(model, data, crops)
    assert 2 < plain["correct_top1"] < 24 < plain["correct_top5"] < 48 == found["images"]
    assert (found["correct_top1"], found["correct_top5"]) == (plain["correct_top1"], plain["correct_top5"])
    assert [row["correct_top1"] for row in found["per_class"]] == plain["by_class"]
    assert outcomes.confusion(8).tolist() == plain["confusion"]
    assert found["loss"] == pytest.approx(plain["loss"], rel=1e-5)


@pytest.mark.parametrize("crops", [1, 10])
def test_dali_scores_almost_the_same(data, model, crops):
    """Its pixels differ by a level of 255, so that near ties of a net that was not trained may turn."""
    pytest.importorskip("nvidia.dali")
    dali, plain = (sorted(evaluated(model, data, crops, f"pipeline={p}")) for p in ("dali", "torchvision"))
    assert sum(ours[2] == theirs[2] for ours, theirs in zip(dali, plain, strict=True)) >= 45
    np.testing.assert_allclose([row[3] for row in dali], [row[3] for row in plain], rtol=0.02)


def test_ranks_and_batches_do_not_change_the_outcome_of_an_image(data, model):
    alone = sorted(evaluated(model, data, 1, "pipeline=torchvision"))
    ranks = [World(rank, 5, rank, 5, "here", torch.device("cpu"), threads=1) for rank in range(5)]
    shared = [evaluated(model, data, 1, "pipeline=torchvision", "batch=4", world=world) for world in ranks]
    together = sorted(row for rows in shared for row in rows)
    assert [row[:3] for row in together] == [row[:3] for row in alone]
    np.testing.assert_allclose([row[3] for row in together], [row[3] for row in alone], rtol=1e-4)


def test_ten_crops_are_mean_probabilities():
    images, weights = torch.randn(6 * 3, 3, 8, 8), torch.randn(3 * 8 * 8, 4)

    def logits(images):
        return images.flatten(1) @ weights

    scores = scores_of(images, logits, 10)
    crops = images.unflatten(0, (6, 3))
    views = [*crops[:5], *(crops[number].flip(-1) for number in (0, 1, 2, 3, 5))]
    wanted = torch.stack([logits(view).double().softmax(1) for view in views]).mean(0)
    torch.testing.assert_close(scores.exp(), wanted)
    assert torch.equal(scores_of(images, logits, 1), logits(images))


def test_of_equal_scores_the_first_is_the_best():
    """So that a net that says the same of all classes is right for one of them, not for all."""
    same = torch.zeros(4, 4)
    assert places(same, torch.arange(4)).tolist() == [0, 1, 2, 3]
    assert places(torch.tensor([[1.0, 3.0, 2.0, 3.0]] * 4), torch.arange(4)).tolist() == [3, 0, 2, 1]
    assert places(torch.full((1, 4), float("nan")), torch.tensor([0])).tolist() == [4]


def test_the_summary_names_classes_and_pairs():
    outcomes = Outcomes(
        labels=np.array([0, 0, 0, 1, 1, 2]),
        places=np.array([0, 1, 1, 0, 5, 3]),
        predicted=np.array([0, 1, 1, 1, 0, 3]),
        losses=np.array([0.5, 1, 1, 0.5, 2, 4]),
    )
    found = summary(outcomes, ["a", "b", "c"], ["a", "b", "c", "3"], confused=2)
    assert (found["images"], found["correct_top1"], found["correct_top5"]) == (6, 2, 5)
    assert (found["top1"], found["loss"]) == (pytest.approx(100 / 3), 1.5)
    assert found["per_class"] == [
        {"class": "a", "images": 3, "correct_top1": 1},
        {"class": "b", "images": 2, "correct_top1": 1},
        {"class": "c", "images": 1, "correct_top1": 0},
    ]
    assert found["confused"] == [
        {"class": "a", "taken_for": "b", "images": 2},
        {"class": "b", "taken_for": "a", "images": 1},
    ]
    report = {**found, "checkpoint": "net.pth", "data": "set", "crops": 10, "bad_images": 1}
    text = format_report(json.loads(json.dumps(report)))
    assert "top-1 33.333 % (2 of 6)" in text and "a classified as b" in text and "1 bad images" in text
    assert text.index("0.00 %") < text.index("33.33 %")


@pytest.mark.parametrize(
    ("names", "outputs", "message"),
    [
        (("cat", "dog"), 2, ""),
        (("cat", "dog"), 9, ""),  # more outputs than classes
        ((), 2, ""),
        ((), 1000, "of other classes: 1000, the data set has 2"),
        (("cat", "eel"), 2, "1 of 2 labels changed class, first 1: eel, now dog"),
        (("cat", "dog", "eel"), 3, "1 of 3 labels changed class, first 2: eel, now none"),
    ],
)
def test_a_net_of_other_classes_is_refused(names, outputs, message):
    info = ModelInfo(Path("net.pth"), "alexnet-owt", outputs, class_names=names)
    if not message:
        return check_classes(info, ("cat", "dog"))
    with pytest.raises(ConfigError, match=message):
        check_classes(info, ("cat", "dog"))


def test_the_validation_split_is_enough(data, tmp_path):
    (tmp_path / "val").symlink_to(data / "val")
    assert len(prepare_evaluation(tmp_path, ()).images) == 48
    with pytest.raises(DataError, match="no folder train; "):
        open_data_set(tmp_path)
    with pytest.raises(DataError, match="no folder val; "):
        open_validation_set(tmp_path / "val")


def test_settings_that_mean_nothing_here_are_refused(data):
    assert prepare_evaluation(data, ("image_size=96", "batch=3")).own_size is False
    for setting, message in (
        ("lr=1", "--set lr; wanted a key that evaluation uses"),
        ("lrr=1", "unknown key"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare_evaluation(data, (setting,))


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_confusion_picture_is_drawn(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    file = tmp_path / f"confusion.{suffix}"
    check_confusion(file)
    plot_confusion(np.array([[3, 1], [0, 4]]), ["cat & dog", "eel"], file, title="top-1 87.50 %")
    if suffix == "svg":
        text = file.read_text()
        assert "cat &amp; dog" in text and "top-1 87.50 %" in text
    else:
        assert Image.open(file).size == (1200, 1050)


@pytest.mark.parametrize("name", ["caf\udce9", "a$b_{$"])
def test_a_picture_takes_classes_of_any_name(tmp_path, name):
    """One is not UTF-8, of the other matplotlib would read a formula."""
    pytest.importorskip("matplotlib")
    plot_confusion(np.eye(2, dtype=int), [name, "eel"], tmp_path / "a.svg", title="")
    assert name.replace("\udce9", r"\udce9") in (tmp_path / "a.svg").read_text()


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_evaluation(tmp_path):
    for name, message in (("a.jpg", "ends in .svg or .png"), ("absent/a.svg", "no folder")):
        with pytest.raises(ConfigError, match=f"--confusion .*{message}"):
            check_confusion(tmp_path / name)


def test_the_loss_is_torchs_cross_entropy(data, model):
    rows = evaluated(model, data, 1, "pipeline=torchvision")
    cfg = resolve(None, (f"image_size={SIDE}", "batch=48", "pipeline=torchvision"))
    with validation_pipeline(cfg, open_validation_set(data), ALONE) as batches:
        batch = next(batches)
    with torch.no_grad():
        wanted = F.cross_entropy(model(batch.images), batch.labels).item()
    assert sum(row[3] for row in rows) / 48 == pytest.approx(wanted, rel=1e-5)
