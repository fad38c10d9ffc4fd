import os
import shutil
import subprocess
import sys
import time

import pytest

from horovod_owt.data import listing
from horovod_owt.data.folder import FolderStore
from horovod_owt.data.listing import cache_files

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
    seen, names = [], listing._image_names

    def spy(folder):
        seen.append(os.path.basename(folder).decode())
        return names(folder)

    monkeypatch.setattr(listing, "_image_names", spy)
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
        monkeypatch.setattr(listing, "VERSION", 2)
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
