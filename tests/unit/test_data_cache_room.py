"""How much room a cache takes, what makes room for it, and what it does without."""

import logging
import os
import shutil
import stat

import pytest
from cached_images import ENOUGH, folders, write_images

from horovod_owt.data import cache as module
from horovod_owt.data.cache import cached
from horovod_owt.data.store import open_data_set

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture
def own(root, tmp_path):
    """A copy to change."""
    return shutil.copytree(root, tmp_path / "own")


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    """In place of /dev/shm, with room."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(module, "MEMORY", folder)
    monkeypatch.setattr(module, "room_in", lambda folder, memory: 10**12)
    return folder


def test_what_does_not_fit_is_not_cached_and_said_in_a_line(root, memory, tmp_path, monkeypatch, caplog):
    data = open_data_set(root)
    with cached(data, "ram", ENOUGH):
        pass
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]
    needed = module.expected_bytes(data.train, ENOUGH)
    monkeypatch.setattr(module, "room_in", lambda folder, memory: needed - 1)
    with caplog.at_level(logging.INFO):
        with cached(data, "ram", ENOUGH) as mine:
            assert mine.train is data.train and mine.val is not data.val
        with cached(data, str(tmp_path / "c"), 0, speaks=False) as mine:
            assert mine.train is not data.train
    (record,) = (each for each in caplog.records if each.levelno == logging.WARNING)
    assert "cache: train needs" in record.message and "a smaller cache_side" in record.message
    monkeypatch.setattr(module, "room_in", lambda folder, memory: 0)
    with cached(data, str(tmp_path / "c"), 0) as mine:
        assert mine.train is data.train and mine.val is data.val


def test_splits_that_fit_alone_but_not_together_are_not_both_cached(root, memory, monkeypatch):
    data = open_data_set(root)
    needed = [module.expected_bytes(split, ENOUGH) for split in (data.train, data.val)]
    monkeypatch.setattr(module, "room_in", lambda folder, memory: sum(needed) - 1)
    with cached(data, "ram", ENOUGH) as mine:
        assert mine.train is not data.train and mine.val is data.val
    monkeypatch.setattr(module, "room_in", lambda folder, memory: sum(needed))
    with cached(data, "ram", ENOUGH) as mine:
        assert mine.train is not data.train and mine.val is not data.val


def test_the_expected_size_is_that_of_the_cache(root, memory):
    data = open_data_set(root)
    with cached(data, "ram", ENOUGH) as mine:
        sizes = [mine.train.pixels(index)[0].nbytes for index in range(len(mine.train))]
    expected = module.expected_bytes(data.train, ENOUGH) - module.REGION
    assert sum(sizes) < expected < 1.15 * sum(sizes)


def test_on_a_short_disk_older_caches_of_other_data_make_room(root, own, tmp_path, monkeypatch):
    place = tmp_path / "c"
    with cached(open_data_set(own), str(place), 0) as data:
        data.train.read(0)
    older = folders(place)
    os.utime(*place.glob("*/*/train"), (1, 1))
    next((own / "train").rglob("*.JPEG")).unlink()
    with cached(open_data_set(own), str(place), 0) as data:
        data.train.read(0)
    assert len(folders(place)) == 2
    monkeypatch.setattr(module, "room_in", lambda folder, memory: 10**9 if len(folders(place)) < 3 else 0)
    with cached(open_data_set(root), str(place), 90) as data:
        assert data.train.pixels(0)
        assert len(folders(place)) == 2 and not set(older) & set(folders(place))


def test_caches_of_other_data_stay_where_they_would_not_make_room_enough(root, own, tmp_path, monkeypatch):
    place = tmp_path / "c"
    with cached(open_data_set(own), str(place), 90) as data:
        assert data.train.pixels(0)
    next((own / "train").rglob("*.JPEG")).unlink()
    monkeypatch.setattr(module, "room_in", lambda folder, memory: 0)
    monkeypatch.setattr(module, "expected_bytes", lambda *args: 10**12)
    with cached(open_data_set(own), str(place), 90) as data:
        assert not isinstance(data.train, module.DecodedImages) and len(folders(place)) == 2


def test_what_is_in_a_cache_needs_no_more_room(root, tmp_path, monkeypatch):
    data, place = open_data_set(root), str(tmp_path / "c")
    with cached(data, place, ENOUGH) as mine:
        for split in (mine.train, mine.val):
            for index in range(len(split)):
                split.pixels(index)
    monkeypatch.setattr(module, "room_in", lambda folder, memory: module.REGION // 2)
    with cached(data, place, ENOUGH) as mine:
        assert mine.train is not data.train and mine.val is not data.val


def test_pixels_of_another_pillow_are_not_used(root, tmp_path, monkeypatch):
    place = tmp_path / "c"
    for version in ("9.0", "10.0"):
        monkeypatch.setattr(module.PIL, "__version__", version)
        for side in (0, ENOUGH):  # files are what they are
            with cached(open_data_set(root), str(place), side):
                pass
    assert len(folders(place)) == 3


def test_a_cache_is_closed_to_others_whose_folder_was_open(root, memory):
    base = memory / f"horovod_owt-{os.geteuid()}"
    base.mkdir()
    base.chmod(0o755)
    with cached(open_data_set(root), "ram", ENOUGH):
        assert stat.S_IMODE(base.stat().st_mode) == 0o700
