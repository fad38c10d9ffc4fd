"""Classes of images: their names, what is named on the command line, and images that do not decode."""

import io
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from bad_files import undecodable
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

from horovod_owt.cli import cli
from horovod_owt.commands.predict import predict
from horovod_owt.data.batch import MEAN, STD
from horovod_owt.data.paths import named_images
from horovod_owt.data.synthetic import write_synthetic
from horovod_owt.errors import ConfigError, RunError
from horovod_owt.inference.names import class_words
from horovod_owt.inference.weights import ModelInfo, metadata, read_trained_model
from horovod_owt.model import alexnet_owt, build_model

pytestmark = pytest.mark.timeout(60)
CLASSES = ("n01440764", "n01443537", "n02085620")
SYNSETS = "n01443537 goldfish, Carassius auratus\nn02085620 Chihuahua\n\nn01440764\ttench, Tinca tinca\n"


@pytest.fixture
def weights(tmp_path, monkeypatch) -> Path:
    """A narrow net with its classes, for images of 64 px."""
    monkeypatch.setattr(alexnet_owt, "HIDDEN", 7)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    file = tmp_path / "net.safetensors"
    info = ModelInfo(file, "alexnet-owt", 3, class_names=CLASSES, image_size=64)
    save_file(build_model("alexnet-owt", 3, seed=1).state_dict(), file, metadata=metadata(info))
    return file


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos") / "set"
    write_synthetic(root, classes=1, train_per_class=1, val_per_class=40, size=(70, 110), workers=1)
    return root / "val"


@pytest.fixture(autouse=True)
def ctrl_c():
    """The command sets what Ctrl-C does."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def run(*words, stdin: str | bytes = "", error: type | None = None):
    done = CliRunner().invoke(predict, list(map(str, words)), input=stdin)
    assert (type(done.exception) if done.exception else None) is error, done.exception
    return done


def test_probabilities_are_those_of_a_plain_loop(weights, photos):
    """Of 40 images, more than a batch."""
    found = json.loads(run(weights, photos, "--json", "--top", 9).stdout)
    assert found["bad"] == [] and len(found["images"]) == 40
    model = read_trained_model(weights).build(torch.device("cpu"))
    usual = Compose([Resize(73), CenterCrop(64), ToTensor(), Normalize(MEAN, STD)])
    for row in found["images"]:
        image = usual(Image.open(row["path"]).convert("RGB"))
        with torch.no_grad():
            wanted = model(image[None]).softmax(1)[0]
        assert [best["label"] for best in row["top"]] == wanted.argsort(descending=True).tolist()
        got = [best["probability"] for best in row["top"]]
        torch.testing.assert_close(torch.tensor(got), wanted.sort(descending=True).values)
        assert all(best["class"] == CLASSES[best["label"]] for best in row["top"])


def test_text_has_words_beside_the_classes(weights, photos, tmp_path):
    (tmp_path / "synsets.txt").write_text(SYNSETS)
    image = next(photos.glob("*/*"))
    lines = run(weights, image, "--synsets", tmp_path / "synsets.txt", "--top", 2).stdout.splitlines()
    assert lines[0] == str(image) and len(lines) == 3
    names = dict(zip(CLASSES, class_words(tmp_path / "synsets.txt", CLASSES), strict=True))
    for line in lines[1:]:
        share, percent, key, *rest = line.split()
        assert percent == "%" and 0 < float(share) < 100 and names[key] == " ".join(rest)


def test_images_that_do_not_decode_are_named_and_others_classified(weights, photos, tmp_path, monkeypatch):
    good = next(photos.glob("*/*"))
    (tmp_path / "page.jpg").write_bytes(b"<html>404</html>")
    (tmp_path / "short.jpg").write_bytes(good.read_bytes()[:300])
    (tmp_path / "garbage.jpg").write_bytes(undecodable())
    (tmp_path / "empty").mkdir()
    words = ["page.jpg", good, "absent.jpg", "no folder/a.jpg", "short.jpg", "garbage.jpg", "empty"]
    monkeypatch.chdir(tmp_path)
    done = run(weights, *words, "--json", error=RunError)
    found = json.loads(done.stdout)
    assert [row["path"] for row in found["images"]] == [str(good)]
    assert {row["path"] for row in found["bad"]} == {str(word) for word in words if word != good}
    assert all(row["fault"] for row in found["bad"])
    assert done.exception.exit_code == 1 and "6 of 7 not classified" in str(done.exception)


def test_nothing_is_classified_for_a_reader_that_has_left(weights, photos, monkeypatch):
    monkeypatch.setitem(predict.callback.__globals__, "stdout_is_read", lambda: False)
    assert run(weights, photos, "--top", 1).stdout.count(".JPEG") == 1


def test_a_name_on_stdin_may_be_in_any_encoding(weights, photos, tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.JPEG"
    shutil.copy(next(photos.rglob("*.JPEG")), name)
    found = json.loads(run(weights, "-", "--json", stdin=name + b"\n").stdout)
    assert [os.fsencode(row["path"]) for row in found["images"]] == [name] and found["images"][0]["top"]


def test_a_name_with_a_terminals_codes_is_shown_in_one_line(weights, photos, tmp_path):
    odd = tmp_path / "a\x1b[2J\n  99.00 %  tench.jpg"
    shutil.copy(next(photos.rglob("*.JPEG")), odd)
    first, *rows = run(weights, odd, "--top", 1).stdout.splitlines()
    assert first.endswith(r"/a\x1b[2J\n  99.00 %  tench.jpg") and len(rows) == 1


def test_a_list_on_stdin_names_files_and_folders(photos):
    first, second = sorted(photos.glob("*/*"))[:2]
    stdin = io.StringIO(f"{second}\n\n{first}\r\n{photos}\n")
    named = list(named_images(["-"], stdin))
    assert named[:2] == [(str(second), ""), (str(first), "")] and len(named) == 42


def test_hidden_files_and_other_kinds_are_left_out_of_a_folder(tmp_path):
    for name in ("b/2.PNG", "a.jpg", "b/.hidden.jpg", ".cache/1.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list(named_images([str(tmp_path)], ())) == [(f"{tmp_path}/a.jpg", ""), (f"{tmp_path}/b/2.PNG", "")]


def test_a_folder_stands_for_images_of_every_format_and_behind_links(tmp_path):
    """None is left out without a word: what does not decode is named."""
    folder, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for path in (folder / "a.webp", folder / "z" / "c.TIFF", elsewhere / "b.jpg"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (folder / "2019").symlink_to(elsewhere)
    (folder / "2020").symlink_to(elsewhere)
    (elsewhere / "up").symlink_to(folder)
    named = [path for path, _ in named_images([str(folder)], ())]
    assert named == [f"{folder}/a.webp", f"{folder}/2019/b.jpg", f"{folder}/z/c.TIFF"]


def test_no_image_at_all_is_bad_usage(weights):
    run(weights, "-", error=ConfigError)


def test_a_run_without_names_has_numbers(weights, photos, monkeypatch):
    torch.save(dict(read_trained_model(weights).weights), weights.with_suffix(".pth"))
    found = json.loads(run(weights.with_suffix(".pth"), next(photos.glob("*/*")), "--json").stdout)
    assert {best["class"] for best in found["images"][0]["top"]} == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("text", "classes", "words"),
    [
        (SYNSETS, CLASSES, ["tench, Tinca tinca", "goldfish, Carassius auratus", "Chihuahua"]),
        (SYNSETS, ("n02085620", "n99999999"), ["Chihuahua", ""]),
        (SYNSETS, ("0", "1", "2"), ["tench, Tinca tinca", "goldfish, Carassius auratus", "Chihuahua"]),
        ("tench\ngoldfish\n", ("0", "1"), ["tench", "goldfish"]),
        ("tench\ngoldfish\n", ("n01440764", "n01443537"), ["tench", "goldfish"]),
    ],
)
def test_words_are_found_by_synset_or_by_line(tmp_path, text, classes, words):
    (tmp_path / "names.txt").write_text(text)
    assert class_words(tmp_path / "names.txt", classes) == words


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"tench\n", "has 1 names, the net 2 classes"),
        (b"n01440764 tench\nn01443537 goldfish\n", "has none of the classes: cat and others"),
        (b"\x00\x01\n\x00", "is a binary file"),
        (None, "No such file"),
    ],
)
def test_a_file_of_other_names_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        class_words(tmp_path / "names.txt", ("cat", "dog"))


@pytest.mark.parametrize("words", [["predict", "weights", "x.jpg"], ["export", "weights", "x.onnx"]])
def test_under_a_launcher_it_is_refused(words):
    env = {f"HOROVOD_{name}": "0" for name in ("RANK", "LOCAL_RANK", "CROSS_RANK")}
    env |= {f"HOROVOD_{name}": "2" for name in ("SIZE", "LOCAL_SIZE")}
    refused = CliRunner().invoke(cli, words, env=env).exception
    assert str(refused) == f"owt {words[0]} under a launcher; wanted one process; fix: run it without"
