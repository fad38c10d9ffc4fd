import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from horovod_owt.data.store import open_data_set
from horovod_owt.data.synthetic import PATTERNS, SyntheticSet, class_name, draw, write_synthetic
from horovod_owt.errors import DataError

SMALL = dict(classes=3, train_per_class=30, val_per_class=2, size=(32, 48))


def tree(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_bytes_depend_on_the_seed_and_not_on_the_number_of_workers(tmp_path):
    write_synthetic(tmp_path / "one", **SMALL, workers=1)
    write_synthetic(tmp_path / "two", **SMALL, workers=2)
    write_synthetic(tmp_path / "other", **SMALL, workers=1, seed=1)
    one, two, other = (tree(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert one.keys() == other.keys() and not {k for k in one if k.endswith("JPEG")} & {
        k for k in one if one[k] == other[k]
    }


def test_it_is_an_image_folder_with_the_asked_numbers(tmp_path):
    seen = []
    assert write_synthetic(tmp_path / "new" / "set", **SMALL, progress=lambda *at: seen.append(at))
    data = open_data_set(tmp_path / "new" / "set")
    assert data.classes == tuple(class_name(label, 3) for label in range(3))
    assert Counter(data.train.labels.tolist()) == {0: 30, 1: 30, 2: 30} and len(data.val) == 6
    assert seen[-1] == (96, 96) and [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert not [path for path in (tmp_path / "new").iterdir() if path.name != "set"]


def test_images_are_jpegs_of_many_shapes():
    images = [Image.open(io.BytesIO(draw(SyntheticSet(), "train", n % 10, n))) for n in range(60)]
    assert {image.format for image in images} == {"JPEG"}
    assert all(160 <= min(image.size) <= 360 for image in images)
    shapes = Counter("portrait" if image.height > image.width else "landscape" for image in images)
    assert shapes["portrait"] > 5 and shapes["landscape"] > 25 and len({image.size for image in images}) > 50


def test_more_classes_than_patterns_are_digits_laid_over_each_other():
    names = [class_name(label, 250) for label in range(250)]
    assert len(set(names)) == 250 and names == sorted(names)
    assert names[207] == "n00000207_diagonal-horizontal-crosses"
    assert class_name(9, 10) == "n00000009_zigzag" and len(PATTERNS) == 10
    assert (
        Image.open(io.BytesIO(draw(SyntheticSet(classes=250, size=(32, 48)), "val", 207, 0))).format == "JPEG"
    )


def features(spec: SyntheticSet, split: str, per_class: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Per image: mean colour, colour histogram, shares of bright and dark, texture."""
    found = {"mean colour": [], "histogram": [], "coverage": [], "texture": []}
    for label in range(10):
        for number in range(per_class):
            image = Image.open(io.BytesIO(draw(spec, split, label, number)))
            pixels = np.asarray(image.convert("RGB"), np.float32)
            found["mean colour"].append(pixels.mean((0, 1)))
            bins = [np.histogram(pixels[..., c], 16, (0, 256))[0] / pixels[..., c].size for c in range(3)]
            found["histogram"].append(np.concatenate(bins))
            bright = np.asarray(image.convert("L"), np.float32)
            bright = (bright - bright.mean()) / bright.std()
            bright *= np.sign((bright**3).mean())  # whichever colour is the rarer one
            found["coverage"].append(np.histogram(bright, 16, (-2.5, 2.5))[0] / bright.size)
            grey = np.asarray(image.convert("L").resize((64, 64)), np.float32)
            steps = [
                np.abs(np.roll(grey, shift, (0, 1)) - grey)[16:-16, 16:-16].mean()
                for shift in [(0, 4), (4, 0), (4, 4), (4, -4), (0, 8), (8, 0), (8, 8)]
            ]
            found["texture"].append(np.array(steps) / (grey.std() + 1))
    return {name: np.array(rows) for name, rows in found.items()}, np.repeat(np.arange(10), per_class)


def nearest_centroid_accuracy(train, train_labels, val, val_labels) -> float:
    scale = train.std(0) + 1e-6
    centroids = np.array([train[train_labels == label].mean(0) for label in range(10)])
    distances = np.linalg.norm((val[:, None] - centroids) / scale, axis=2)
    return float((distances.argmin(1) == val_labels).mean())


def test_colours_do_not_tell_the_class_and_texture_does():
    spec = SyntheticSet(size=(64, 96))
    (train, train_labels), (val, val_labels) = features(spec, "train", 30), features(spec, "val", 20)
    score = {k: nearest_centroid_accuracy(train[k], train_labels, val[k], val_labels) for k in train}
    assert max(score["mean colour"], score["histogram"], score["coverage"]) < 0.17, (
        score
    )  # chance 0.1, sd 0.02
    assert score["texture"] > 0.4, score  # seven crude numbers; a net sees more


def test_the_same_data_set_is_not_written_twice(tmp_path):
    assert write_synthetic(tmp_path / "set", **SMALL, workers=1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")}
    assert not write_synthetic(tmp_path / "set", **SMALL, workers=1)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")}


def test_a_set_that_has_lost_images_is_not_called_there(tmp_path):
    """A host that deletes old files of /tmp leaves the note, which each command has read."""
    write_synthetic(tmp_path / "set", **SMALL, workers=1)
    sorted((tmp_path / "set").glob("*/*/*.JPEG"))[7].unlink()
    with pytest.raises(DataError, match="set has 95 of its 96 images; .* remove it"):
        write_synthetic(tmp_path / "set", **SMALL, workers=1)


def test_an_empty_folder_will_do(tmp_path):
    (tmp_path / "set").mkdir()
    assert write_synthetic(tmp_path / "set", **SMALL, workers=1)
    assert (tmp_path / "set").stat().st_mode & 0o777 == (tmp_path / "set" / "train").stat().st_mode & 0o777


@pytest.mark.parametrize(
    ("there", "saw"),
    [
        ("file", "is a file"),
        ("other files", r"is not empty: it contains thesis.tex;"),
        ("other set", r"another synthetic data set \(seed 7\)"),
        ("broken note", "unreadable .*synthetic.json;"),
    ],
)
def test_something_else_there_is_left_alone(tmp_path, there, saw):
    out = tmp_path / "set"
    if there == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        if there == "other files":
            (out / "thesis.tex").write_text("mine")
        else:
            note = dict(SMALL, size=list(SMALL["size"]), seed=7)
            (out / "synthetic.json").write_text(json.dumps(note) if there == "other set" else "{")
    before = tree(tmp_path)
    with pytest.raises(DataError, match=saw):
        write_synthetic(out, **SMALL, workers=1)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "wrong", [dict(classes=0), dict(val_per_class=0), dict(size=(90, 60)), dict(seed=-1)]
)
def test_impossible_numbers_are_refused(tmp_path, wrong):
    with pytest.raises(DataError):
        write_synthetic(tmp_path / "set", **{**SMALL, **wrong}, workers=1)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_nothing_behind(tmp_path):
    script = tmp_path / "write.py"
    script.write_text(
        "from pathlib import Path\n"
        "from horovod_owt.data.synthetic import write_synthetic\n"
        "if __name__ == '__main__':\n"
        f"    write_synthetic(Path({str(tmp_path / 'out' / 'set')!r}), train_per_class=10**5, workers=2,\n"
        "                    size=(32, 48), progress=lambda *at: print(at, flush=True))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, script],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        process.stdout.readline()  # it is under way
        assert list((tmp_path / "out").iterdir())
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: parent and workers
        _, stderr = process.communicate(timeout=30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0 and b"KeyboardInterrupt" in stderr
    assert not list((tmp_path / "out").iterdir())
