"""owt report: what `owt evaluate` has found about a run, with pictures."""

import base64
import io
import json

import pytest
from pages import html_of, report, summary
from PIL import Image, ImageOps, ImageStat
from written_runs import WrittenRun

from horovod_owt.data.synthetic import write_synthetic
from horovod_owt.errors import ConfigError


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images") / "data"
    write_synthetic(root, classes=2, train_per_class=1, val_per_class=2, size=(40, 60), workers=1)
    return root


def evaluation(data, **values):
    a, b = CLASSES
    rows = [{"class": a, "images": 50, "correct_top1": 30}, {"class": b, "images": 50, "correct_top1": 50}]
    pairs = [{"class": a, "taken_for": b, "images": 20}]
    scores = {"images": 100, "correct_top1": 80, "top1": 80.0, "top5": 100.0, "crops": 10}
    return json.dumps({**scores, "per_class": rows, "confused": pairs, "data": str(data), **values})


CLASSES = ("n00000000_horizontal", "n00000001_vertical")


def test_confused_classes_have_pictures_of_the_validation_set(tmp_path, images):
    WrittenRun(tmp_path).start(["a"])
    (tmp_path / "evaluation.json").write_text(evaluation(images))
    found = summary(tmp_path)["evaluation"]
    (pair,) = found["confused"]
    assert (pair["class"], pair["taken_for"], pair["share"]) == (*CLASSES, 0.4)
    for name, picture in zip(CLASSES, pair["thumbnails"], strict=True):
        first = Image.open(min((images / "val" / name).iterdir())).convert("RGB")
        shown = Image.open(io.BytesIO(base64.b64decode(picture.partition("base64,")[2])))
        assert shown.size == (96, 96)
        means = [ImageStat.Stat(image).mean for image in (ImageOps.fit(first, (96, 96)), shown)]
        assert means[0] == pytest.approx(means[1], abs=3)
    assert [row["class"] for row in found["worst"]] == [CLASSES[0]]
    text = html_of([summary(tmp_path)])
    assert (
        text.count('<img class="thumb" src="data:image/jpeg;base64,') == 2
        and "10\N{NO-BREAK SPACE}crops" in text
    )


def test_without_the_images_the_pairs_are_named(tmp_path, images):
    WrittenRun(tmp_path).start(["a"])
    (tmp_path / "evaluation.json").write_text(evaluation(tmp_path / "gone"))
    found = summary(tmp_path)["evaluation"]
    assert found["confused"][0]["images"] == 20
    assert found["no_thumbnails"] == f"No pictures: {tmp_path / 'gone'} does not exist"
    assert "classified as" in html_of([summary(tmp_path)])
    unknown = [{"class": "<b>", "taken_for": CLASSES[0], "images": 1}]
    (tmp_path / "evaluation.json").write_text(evaluation(images, confused=unknown))
    assert summary(tmp_path)["evaluation"]["confused"][0]["thumbnails"][0] is None
    assert "<b>" not in html_of([summary(tmp_path)])


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"per_class": 1}', '{"per_class": [], "top1": "x"}']
)
def test_a_foreign_evaluation_is_a_note_or_where_asked_for_an_error(tmp_path, content):
    WrittenRun(tmp_path).start(["a"])
    file = tmp_path / "evaluation.json"
    file.write_text(content)
    assert str(file) in summary(tmp_path)["notes"][0] and html_of([summary(tmp_path)])
    error = report(tmp_path, "--evaluation", file).exception
    assert isinstance(error, ConfigError) and "owt evaluate --json" in str(error)
    assert "with several runs" in str(report(tmp_path, tmp_path, "--evaluation", file).exception)
