import hashlib
import os
import shutil
import subprocess
import sys
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from horovod_owt.data import arrays
from horovod_owt.data.arrays import Names
from horovod_owt.data.folder import FolderStore
from horovod_owt.data.store import fingerprint, open_data_set
from horovod_owt.errors import DataError


@pytest.fixture
def root(tmp_path):
    """Two classes; the store never looks inside a file."""
    for split in ("train", "val"):
        for name in ("n02", "n01"):
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for image in ("b.JPEG", "a.jpg", "c.PNG", "d.Jpeg"):
                (folder / image).write_bytes(f"{split} {name} {image}".encode())
    return tmp_path / "set"


def test_samples_are_in_sorted_order(root):
    store = open_data_set(root).train
    assert store.classes == ("n01", "n02") and len(store) == 8
    assert store.labels.dtype == np.int64 and store.labels.tolist() == [0] * 4 + [1] * 4
    names = ["a.jpg", "b.JPEG", "c.PNG", "d.Jpeg"]
    assert [store.path(i) for i in range(8)] == [
        str(root / "train" / c / n) for c in store.classes for n in names
    ]
    assert store.read(6) == b"train n02 c.PNG"


def test_hidden_and_foreign_files_are_ignored(root):
    (root / "train" / ".DS_Store").touch()
    (root / "train" / ".snapshot").mkdir()
    (root / "train" / "synsets.txt").touch()
    (root / "train" / "n01" / "._a.jpg").touch()
    (root / "train" / "n01" / "labels.csv").touch()
    (root / "train" / "n01" / "thumbs.jpg").mkdir()
    for folder in ("lost+found", "__MACOSX", "@eaDir", "n01/@eaDir/a.jpg", "$RECYCLE.BIN"):
        (root / "train" / folder).mkdir(parents=True, exist_ok=True)
    (root / "train" / "n01" / "@eaDir" / "a.jpg" / "SYNOPHOTO_THUMB_M.jpg").touch()
    data = open_data_set(root)
    assert data.train.classes == ("n01", "n02") and len(data.train) == 8 and data.left_out == []


def test_links_and_odd_names_are_read(root):
    os.symlink(root / "val" / "n01" / "a.jpg", root / "train" / "n01" / "e.jpg")
    odd = os.path.join(os.fsencode(root), b"train", b"n02", b"caf\xe9.jpg")  # not UTF-8
    Path(os.fsdecode(odd)).write_bytes(b"latin")
    store = open_data_set(root).train
    assert store.read(4) == b"val n01 a.jpg" and store.read(9) == b"train n02 d.Jpeg"
    assert store.path(8) == os.fsdecode(odd) and store.read(8) == b"latin"


def test_a_sample_costs_less_than_100_bytes(tmp_path):
    (tmp_path / "n01440764").mkdir()
    for number in range(20_000):
        (tmp_path / "n01440764" / f"n01440764_{number}.JPEG").touch()
    tracemalloc.start()
    store = FolderStore(tmp_path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(store) == 20_000 and held / len(store) < 100


def make_file(root):
    shutil.rmtree(root)
    root.write_text("")


def make_empty(root):
    shutil.rmtree(root)
    root.mkdir()


def flatten(root):
    for image in (root / "val").rglob("*.*"):
        image.rename(root / "val" / f"{image.parent.name}-{image.name}")
    for folder in list((root / "val").iterdir()):
        if folder.is_dir():
            folder.rmdir()


def archive_classes(root):
    """As the archive of ILSVRC2012's training set is when it is unpacked once."""
    for folder in list((root / "train").iterdir()):
        if folder.is_dir():
            shutil.make_archive(str(folder), "tar", folder)
            shutil.rmtree(folder)


def empty_class(root):
    for image in (root / "train" / "n02").iterdir():
        image.rename(image.with_suffix(".txt"))


def nest_images(root):
    """As in Tiny ImageNet."""
    for folder in (root / "train").iterdir():
        if folder.is_dir():
            folder.rename(root / "images")
            folder.mkdir()
            (root / "images").rename(folder / "images")


@pytest.mark.parametrize(
    ("damage", "saw"),
    [
        (lambda root: shutil.rmtree(root), "set does not exist; wanted .*train/CLASS"),
        (make_file, "set is not a folder"),
        (make_empty, "set is empty: no folder train nor val; .*fix: .*owt data synth"),
        (lambda root: (root / "val").rename(root / "valid"), "contains train, valid: no folder val;"),
        (lambda root: (root / "val").rename(root / "train" / "val"), "contains train: no folder val;"),
        (flatten, "set/val has no class folders, but 8 images outside of one; .*owt data prepare"),
        (
            archive_classes,
            "set/train has no class folders, but archives: n01.tar, n02.tar; .*owt data prepare",
        ),
        (
            nest_images,
            r"in class n01, n02 \(2 of 2 empty\); left out: 8 .* fix: move the images up, directly",
        ),
        (empty_class, r"set/train: no image in class n02 \(1 of 2 empty\)"),
        (
            lambda root: (root / "val" / "n02").rename(root / "val" / "n03"),
            r"train has 2 classes \(n02 only there\), val has 2 \(n03 only there\)",
        ),
        (
            lambda root: shutil.rmtree(root / "train" / "n01"),
            r"train has 1 classes \(none only there\), val has 2",
        ),
        (lambda root: os.symlink("nowhere", root / "train" / "n03"), None),  # a dangling link is no class
        (lambda root: os.symlink("loop", root / "loop"), None),  # nor is it of interest what lies beside
    ],
)
def test_a_bad_folder_is_named_with_its_fix(root, damage, saw):
    damage(root)
    if saw is None:
        open_data_set(root)
        return
    with pytest.raises(DataError, match=saw) as caught:
        open_data_set(root)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["cafe\u0301", "CAF\u00c9", "caf\u00e9 "])
def test_class_names_that_only_look_alike_are_told_apart(root, name):
    """As after a copy by way of a Mac, or of a disk that ignores case."""
    (root / "train" / "n02").rename(root / "train" / "caf\u00e9")
    (root / "val" / "n02").rename(root / "val" / name)
    with pytest.raises(DataError) as caught:
        open_data_set(root)
    assert caught.value.fix == f"rename {ascii(name)} in val to 'caf\\xe9', as it is in train"


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o311])
@pytest.mark.parametrize("folder", [".", "train", "val/n01"])
def test_an_unreadable_folder_is_named(root, folder, mode):
    (root / folder).chmod(mode)
    script = (
        "import sys; from horovod_owt.data.store import open_data_set\n"
        "try: open_data_set(sys.argv[1])\n"
        "except Exception as trouble: print(type(trouble).__name__, trouble)"
    )
    command = [sys.executable, "-c", script, str(root)]
    if os.geteuid() == 0:  # root reads everything, unless these two capabilities are taken away
        if not shutil.which("setpriv"):
            pytest.skip("running as root without setpriv")
        drop = "-dac_override,-dac_read_search"
        command = ["setpriv", f"--inh-caps={drop}", f"--bounding-set={drop}", *command]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        said = subprocess.check_output(command, env=env, text=True, timeout=30).strip()
    finally:
        (root / folder).chmod(0o755)
    assert said.startswith(f"DataError {root / folder} is not readable by user ") and "chmod" in said


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 7])
def test_names_are_joined_taken_apart_and_separated_block_by_block(monkeypatch, count):
    monkeypatch.setattr(arrays, "BLOCK", 3)
    plain = [b"n%d" % number * (number % 3) for number in range(count)]  # some of them empty
    names = Names.joined(iter(plain))
    assert list(names) == plain == [names[i] for i in range(count)]
    assert b"".join(part.tobytes() for part in names.separated()) == b"\0".join(plain)


@dataclass
class Labelled:
    """What a fingerprint reads of a store."""

    classes: tuple[str, ...]
    labels: np.ndarray
    names: Names

    def __len__(self) -> int:
        return len(self.labels)


def test_a_fingerprint_makes_no_object_of_each_sample(monkeypatch):
    monkeypatch.setattr(arrays, "BLOCK", 1000)
    count, names = 50_000, [b"n01440764_%d.JPEG" % number for number in range(50_000)]
    labels = np.arange(count) // 25_000
    store = Labelled(("n01", "n02"), labels, Names.joined(names))
    tracemalloc.start()
    try:
        found = fingerprint(store)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    digest = hashlib.sha256(b"n01\0n02" + labels.tobytes() + b"\0".join(names)).hexdigest()
    assert found == f"50000 images of 2 classes, sha256 {digest[:12]}"
    assert peak < 1_000_000  # 20 bytes a sample: a bytes object alone takes 50
