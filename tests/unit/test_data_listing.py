import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from bad_files import encoded
from click.testing import CliRunner

from horovod_owt.cli import cli
from horovod_owt.data import arrays, listing
from horovod_owt.data.build import Form
from horovod_owt.data.folder import FolderStore
from horovod_owt.data.listing import cache_files
from horovod_owt.data.pack import pack
from horovod_owt.data.store import open_data_set
from horovod_owt.errors import DataError

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def split(tmp_path, monkeypatch):
    """ROOT/train of three classes whose names are kept, changed long enough ago."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(listing, "CACHE_FROM", 1)
    monkeypatch.setattr(listing, "SETTLED_NS", 0)  # ctime cannot be set back
    for name in ("n01", "n02", "n03"):
        folder = tmp_path / "root" / "train" / name
        folder.mkdir(parents=True)
        for number in range(3):
            (folder / f"{name}_{number}.JPEG").touch()
    time.sleep(0.02)  # a tick: the first listing must not meet the folders' own time
    return tmp_path / "root" / "train"


@pytest.fixture
def listed(monkeypatch):
    """The names of the class folders whose images are listed, as they are."""
    seen, contents = [], listing._contents

    def spy(folder):
        seen.append(os.path.basename(folder).decode())
        return contents(folder)

    monkeypatch.setattr(listing, "_contents", spy)
    return seen


def paths(split) -> list[str]:
    store = FolderStore(split)
    return [store.path(index) for index in range(len(store))]


def on_disk(split) -> list[str]:
    return sorted(map(str, split.glob("*/*.JPEG")))


def test_names_are_kept_and_used(split, listed):
    first = paths(split)
    assert listed == ["n01", "n02", "n03"] and first == on_disk(split)
    assert [path.exists() for path in cache_files(split)] == [True, False]
    listed.clear()
    assert paths(split) == first and listed == []


def add(split):
    (split / "n02" / "new.JPEG").touch()


def remove(split):
    (split / "n02" / "n02_1.JPEG").unlink()


def rename(split):
    (split / "n02" / "n02_1.JPEG").rename(split / "n02" / "a.JPEG")


def change_as_rsync_does(split):
    before = os.stat(split / "n02")
    add(split)
    os.utime(split / "n02", ns=(before.st_atime_ns, before.st_mtime_ns))


def swap_in_another_folder(split):
    shutil.copytree(split / "n01", split.parent / "other")
    shutil.rmtree(split / "n02")
    (split.parent / "other").rename(split / "n02")


@pytest.mark.parametrize("change", [add, remove, rename, change_as_rsync_does, swap_in_another_folder])
def test_only_a_changed_class_is_listed_again(split, listed, change):
    paths(split)
    change(split)
    listed.clear()
    assert paths(split) == on_disk(split) and listed == ["n02"]
    time.sleep(0.02)
    listed.clear()
    assert paths(split) == on_disk(split) and listed == []


def test_classes_come_and_go(split, listed):
    paths(split)
    shutil.rmtree(split / "n01")
    (split / "n00").mkdir()
    (split / "n00" / "a.JPEG").touch()
    listed.clear()
    store = FolderStore(split)
    assert store.classes == ("n00", "n02", "n03") and listed == ["n00"]
    assert store.labels.tolist() == [0, 1, 1, 1, 2, 2, 2] and paths(split) == on_disk(split)


def test_a_folder_that_has_just_changed_is_not_trusted(split, listed, monkeypatch):
    monkeypatch.setattr(listing, "SETTLED_NS", 2 * 10**9)
    for _ in range(2):
        listed.clear()
        paths(split)
        assert listed == ["n01", "n02", "n03"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign", "version"])
def test_a_cache_that_is_damaged_or_foreign_counts_for_nothing(split, listed, damage, monkeypatch):
    first, cache = paths(split), cache_files(split)[0]
    data = bytearray(cache.read_bytes())
    if damage == "version":
        monkeypatch.setattr(listing, "VERSION", 99)
    elif damage == "flipped":
        at = data.index(b"n02_1.JPEG")
        data[at : at + 3] = b"xyz"
        cache.write_bytes(data)
    else:
        cache.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "foreign": b"PK\x03\x04mine"}[damage])
    listed.clear()
    assert paths(split) == first and listed == ["n01", "n02", "n03"]
    listed.clear()
    assert paths(split) == first and listed == []  # it was made anew


def test_where_root_is_read_only_the_names_are_kept_at_home(split, listed, monkeypatch):
    at_root, at_home = cache_files(split)
    real = listing.write_arrays

    def refuse(path, arrays):
        if path == at_root:
            raise PermissionError(13, "Permission denied")
        real(path, arrays)

    monkeypatch.setattr(listing, "write_arrays", refuse)
    first = paths(split)
    assert at_home.exists() and not at_root.exists()
    listed.clear()
    assert paths(split) == first and listed == []


def test_a_user_without_home_and_passwd_entry_has_no_cache_there(split, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 54321)
    assert [path.parent for path in cache_files(split)] == [split.parent]


def test_a_link_that_dangled_counts_once_its_disk_is_mounted(split, listed):
    """The folder that has the link does not change by that."""
    (split / "n02" / "link.JPEG").symlink_to(split.parent / "disk" / "a.JPEG")
    (split / "n03" / "other.JPEG").symlink_to(split.parent / "nowhere")
    time.sleep(0.02)
    assert len(paths(split)) == 9
    (split.parent / "disk").mkdir()
    (split.parent / "disk" / "a.JPEG").touch()
    listed.clear()
    assert len(paths(split)) == 10 and listed == ["n02"]
    listed.clear()
    store = FolderStore(split)
    assert len(store) == 10 and listed == []
    assert [each.path for each in store.left_out] == [str(split / "n03" / "other.JPEG")]


def test_small_folders_leave_no_file_behind(split, monkeypatch):
    monkeypatch.setattr(listing, "CACHE_FROM", 10)
    paths(split)
    assert [entry.name for entry in split.parent.iterdir()] == ["train"]


def test_several_ranks_may_open_at_once(split):
    code = (
        "import sys; from horovod_owt.data import listing, folder; listing.CACHE_FROM = 1\n"
        "print(len(folder.FolderStore(__import__('pathlib').Path(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", code, str(split)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) for _ in range(4)]
    assert [rank.communicate(timeout=50)[0] for rank in ranks] == ["9\n"] * 4
    assert sorted(entry.name for entry in split.parent.iterdir()) == [".owt-index-train.npz", "train"]


# ---- what is left out ----


def image_set(root):
    """Two classes of three images in each split."""
    for split in ("train", "val"):
        for name in ("n01", "n02"):
            (root / split / name).mkdir(parents=True)
            for number in range(3):
                (root / split / name / f"{number}.JPEG").write_bytes(encoded())
    return root


@pytest.fixture
def untidy(tmp_path):
    """A data set with everything that the listing leaves out; path -> reason and number of images."""
    root = image_set(tmp_path / "set")
    n01, n02 = root / "train" / "n01", root / "train" / "n02"
    (n01 / "b.webp").touch()
    (n01 / "C.TIFF").touch()
    (n01 / "no_suffix").touch()
    (n01 / "dangling.JPEG").symlink_to(tmp_path / "nowhere")
    (n01 / "loop.png").symlink_to("loop.png")
    (n01 / "folder.jpg").mkdir()
    (n01 / "folder.jpg" / "d.jpg").touch()
    (n02 / "deeper" / "still").mkdir(parents=True)
    for number in range(4):
        (n02 / "deeper" / "still" / f"{number}.JPEG").touch()
    (root / "train" / "stray.JPEG").touch()
    (root / "train" / "n03").symlink_to(tmp_path / "no class")
    # not images, and no word about them
    for name in ("notes.txt", "Thumbs.db", "0.cls", "._0.JPEG", ".hidden"):
        (n02 / name).touch()
    (n02 / "empty").mkdir()
    (n02 / "UPPER.JPG").write_bytes(encoded())  # an image
    (n02 / "link.JPEG").symlink_to("0.JPEG")  # an image
    return root, {
        n01 / "b.webp": (".webp is not read", 1),
        n01 / "C.TIFF": (".tiff is not read", 1),
        n01 / "no_suffix": ("a name without suffix", 1),
        n01 / "dangling.JPEG": ("dangling link", 1),
        n01 / "loop.png": ("dangling link", 1),
        n01 / "folder.jpg": ("in a folder below its class", 1),
        n02 / "deeper": ("in a folder below its class", 4),
        root / "train" / "stray.JPEG": ("outside a class folder", 1),
        root / "train" / "n03": ("dangling link", 1),
    }


def left_out(data) -> dict:
    return {Path(each.path): (each.reason, each.images) for each in data.left_out}


@pytest.mark.parametrize("cached", [False, True])
def test_what_is_left_out_is_known_with_its_reason(untidy, monkeypatch, cached):
    root, wanted = untidy
    if cached:
        monkeypatch.setattr(listing, "CACHE_FROM", 1)
        monkeypatch.setattr(listing, "SETTLED_NS", -(10**10))
        open_data_set(root)
        monkeypatch.setattr(listing, "_contents", lambda folder: pytest.fail("listed again"))
    data = open_data_set(root)
    assert left_out(data) == wanted and (len(data.train), len(data.val)) == (8, 6)


def test_verify_names_what_is_left_out_and_others_count_it(untidy, tmp_path, caplog):
    root, wanted = untidy

    def owt(*argv):
        return CliRunner().invoke(cli, ["data", *map(str, argv)], standalone_mode=False)

    done = owt("verify", root, "--pipeline", "torchvision")
    assert done.exception is None and "0 bad, 0 remarks, 12 left out" in done.stdout
    for path, (reason, images) in wanted.items():
        assert f"left out  {path}: {reason}" + (f" ({images} images)" if images > 1 else "") in done.stdout
    report = json.loads(owt("verify", root, "--pipeline", "torchvision", "--json").stdout)
    assert {Path(each["path"]): (each["reason"], each["images"]) for each in report["left_out"]} == wanted
    assert "left out" not in owt("verify", root, "--pipeline", "torchvision", "--split", "val").stdout
    said = owt("stats", root).stdout
    assert "left out: 5 (in a folder below its class), 3 (dangling link), 1 (outside a class folder)" in said
    pack(root, tmp_path / "packed", Form(), workers=1)
    assert "left out: 5 (in a folder below its class)" in caplog.text


def test_shards_and_folders_that_an_index_lacks_are_left_out(tmp_path):
    pack(image_set(tmp_path / "set"), tmp_path / "packed", Form(), workers=1)
    train = tmp_path / "packed" / "train"
    assert open_data_set(tmp_path / "packed").left_out == []
    (train / "shard-000007.tar").touch()
    shutil.copytree(tmp_path / "set" / "train" / "n01", train / "n01")
    wanted = {train / "n01": ("not in index.npz", 3), train / "shard-000007.tar": ("not in index.npz", 1)}
    assert left_out(open_data_set(tmp_path / "packed")) == wanted


def test_a_class_that_has_only_other_formats_is_refused_with_their_number(tmp_path):
    root = image_set(tmp_path / "set")
    for path in (root / "val" / "n02").iterdir():
        path.rename(path.with_suffix(".bmp"))
    with pytest.raises(DataError, match=r"no image in class n02 .*; left out: 3 \(.bmp is not read\)"):
        open_data_set(root)


def test_names_that_have_not_changed_are_used_where_they_are(split, monkeypatch):
    """Those of a large split are mapped: a copy would be one for each rank of the host."""
    FolderStore(split)
    monkeypatch.setattr(arrays, "MAP_FROM", 1)
    store = FolderStore(split)
    assert isinstance(store.names.blob, np.memmap) and isinstance(store.names.ends, np.memmap)
    assert paths(split) == on_disk(split)
