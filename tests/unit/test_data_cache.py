"""Batches from a cache, and the life of its folder."""

import importlib.util
import logging
import os
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pytest
import torch
from bad_files import encoded, undecodable

from horovod_owt.config import resolve
from horovod_owt.data import cache as module
from horovod_owt.data import pipeline_torchvision
from horovod_owt.data.batch import MEAN, STD
from horovod_owt.data.build import Form
from horovod_owt.data.cache import cached
from horovod_owt.data.faults import BadImages
from horovod_owt.data.feed import TrainFeed, ValidationFeed
from horovod_owt.data.folder import FolderStore
from horovod_owt.data.pack import pack
from horovod_owt.data.pipeline import make_pipeline
from horovod_owt.data.store import open_data_set
from horovod_owt.data.synthetic import write_synthetic
from horovod_owt.errors import ConfigError, RunError

pytestmark = pytest.mark.timeout(60)

needs_dali = pytest.mark.skipif(not importlib.util.find_spec("nvidia.dali"), reason="DALI is not installed")
KINDS = [pytest.param("dali", marks=needs_dali), "torchvision"]
SIDE, BATCH = 64, 12
ENOUGH = 73  # shorter side of what validation at SIDE sees


@pytest.fixture(autouse=True)
def plenty():
    """Room, however full this machine's disk is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "room_in", lambda folder, memory: 10**12)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "set"
    write_synthetic(root, classes=3, train_per_class=12, val_per_class=4, size=(80, 160), workers=1)
    return root


@pytest.fixture
def own(root, tmp_path):
    """A copy to change."""
    copy = tmp_path / "own"
    subprocess.run(["cp", "-r", str(root), str(copy)], check=True)
    return copy


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """In place of /dev/shm."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(module, "MEMORY", folder)
    return folder


def batches(kind, feed, steps=6):
    with make_pipeline(kind, feed, image_size=SIDE, device_id=None, num_threads=2) as pipe:
        return list(islice(pipe, steps))


def training(kind, data, steps=6, **options):
    return batches(kind, TrainFeed(data.train, seed=3, batch=BATCH, **options), steps)


def validation(kind, data, **options):
    return batches(kind, ValidationFeed(data.val, batch=BATCH, **options))


def same(some, others) -> bool:
    pairs = zip(some, others, strict=True)
    return all(torch.equal(a.images, b.images) and a.indices.tolist() == b.indices.tolist() for a, b in pairs)


def levels(some) -> torch.Tensor:
    images = torch.cat([batch.images for batch in some])
    return 255 * (images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1))


def without_reading(monkeypatch):
    def refused(self, index):
        raise AssertionError("read from the data set")

    monkeypatch.setattr(FolderStore, "read", refused)


@pytest.mark.parametrize("kind", KINDS)
def test_files_in_a_cache_give_the_same_batches_and_are_not_read_again(root, tmp_path, kind, monkeypatch):
    data = open_data_set(root)
    plain, seen = training(kind, data), validation(kind, data)
    with cached(data, str(tmp_path / "c"), 0) as mine:
        assert same(training(kind, mine), plain) and same(validation(kind, mine), seen)
    again = open_data_set(root)  # the next run
    monkeypatch.setattr(module, "expected_bytes", lambda *args: 0)
    without_reading(monkeypatch)
    with cached(again, str(tmp_path / "c"), 0) as mine:
        assert same(training(kind, mine), plain) and same(validation(kind, mine), seen)


def test_decoded_images_are_the_same_for_both_pipelines_in_and_outside_the_cache(root, memory, monkeypatch):
    with cached(open_data_set(root), "ram", ENOUGH) as data:
        first = training("torchvision", data)
        with pytest.MonkeyPatch.context() as patch:
            without_reading(patch)
            assert same(training("torchvision", data), first)
            if importlib.util.find_spec("nvidia.dali"):
                assert same(training("dali", data), first)
        monkeypatch.setattr(data.train._slots, "get", lambda *args: None)
        assert same(training("torchvision", data), first)


def test_an_older_torch_shows_the_same_by_pillow(root, memory, monkeypatch):
    with cached(open_data_set(root), "ram", ENOUGH) as data:
        mine = training("torchvision", data)
        monkeypatch.setattr(pipeline_torchvision, "RESIZES_BYTES", False)
        difference = (levels(training("torchvision", data)) - levels(mine)).abs()
    assert difference.mean() < 0.1 and difference.max() < 1.1


@pytest.mark.parametrize("kind", KINDS)
def test_decoded_images_show_what_is_shown_without_a_cache(root, memory, kind):
    """Training from 73 px: 5 levels of 255 on average, as crops are enlarged more; all pixels: rounding.

    Validation sees what it would have reduced the images to, exactly.
    """
    data = open_data_set(root)
    plain, seen = training(kind, data), validation(kind, data)
    with cached(data, "ram", ENOUGH) as reduced:
        mine = training(kind, reduced)
        assert [b.indices.tolist() for b in mine] == [b.indices.tolist() for b in plain]
        assert 1 < (levels(mine) - levels(plain)).abs().mean() < 6
        difference = (levels(validation(kind, reduced)) - levels(seen)).abs()
        assert difference.max() < (1e-3 if kind == "torchvision" else 40) and difference.mean() < 0.3
    with cached(data, "ram", 160) as whole:
        difference = (levels(training(kind, whole)) - levels(plain)).abs()
        assert difference.mean() < 0.3 and difference[..., 1:-1, 1:-1].max() < 2.1


def test_a_run_resumes_at_its_position_with_the_same_batches(root, memory):
    with cached(open_data_set(root), "ram", ENOUGH) as data:
        whole = training("torchvision", data, steps=8)
        assert same(training("torchvision", data, steps=3, position=5 * BATCH), whole[5:])
        ranks = [training("torchvision", data, steps=2, rank=r, world_size=4) for r in range(4)]
        assert same([ranks[n % 4][n // 4] for n in range(8)], whole)


@pytest.mark.parametrize("side", [0, ENOUGH])
def test_a_file_that_changed_is_read_again(own, tmp_path, side):
    def shown(data):
        return training("torchvision", data, steps=3)

    with cached(open_data_set(own), str(tmp_path / "c"), side) as data:
        before = shown(data)
        victim = data.train.path(int(before[0].indices[0]))
        size = os.stat(victim).st_size
        with open(victim, "r+b") as file:  # another picture in as many bytes
            image = encoded(size=(100, 90), quality=30)
            assert len(image) < size
            file.write(image + bytes(size - len(image)))
        after = shown(data)
        assert not torch.equal(before[0].images[0], after[0].images[0])
        assert torch.equal(before[0].images[1:], after[0].images[1:])
    with cached(open_data_set(own), str(tmp_path / "c"), side) as data:
        assert same(shown(data), after)
    plain = open_data_set(own)
    if not side:
        assert same(shown(plain), after)


@pytest.mark.parametrize("side", [0, ENOUGH])
def test_bad_images_are_found_as_without_a_cache(own, tmp_path, side):
    names = sorted((own / "train").rglob("*.JPEG"))
    names[0].write_bytes(b"")
    names[1].write_bytes(undecodable())
    data = open_data_set(own)
    names[2].unlink()  # after it was listed
    plain = training("torchvision", data, bad_images=BadImages())
    with cached(data, str(tmp_path / "c"), side) as mine:
        for _ in range(2):
            found = training("torchvision", mine, bad_images=BadImages())
            assert [b.faults for b in found] == [b.faults for b in plain]
            assert [b.valid.tolist() for b in found] == [b.valid.tolist() for b in plain]
        assert len({index for b in found for index in b.bad_images()}) == 3
        with pytest.raises(RunError, match="bad image .*: "):
            training("torchvision", mine)


def test_a_batch_without_a_good_image_is_grey(own, tmp_path):
    for file in (own / "train").rglob("*.JPEG"):
        file.write_bytes(b"")
    with cached(open_data_set(own), str(tmp_path / "c"), ENOUGH) as data:
        (batch,) = training("torchvision", data, steps=1, bad_images=BadImages())
    assert not batch.valid.any() and batch.images.abs().max() < 0.1


def test_packed_images_are_cached_like_files(root, tmp_path):
    pack(root, tmp_path / "packed", Form(), workers=1)
    plain = training("torchvision", open_data_set(root))
    with cached(open_data_set(tmp_path / "packed"), str(tmp_path / "c"), 0) as data:
        assert same(training("torchvision", data), plain) and same(training("torchvision", data), plain)


def folders(base):
    return sorted(path.name for path in base.glob("horovod_owt-*/*"))


def test_in_memory_the_last_to_leave_removes_it(root, memory):
    data = open_data_set(root)
    with cached(data, "ram", ENOUGH) as first:
        with cached(data, "ram", ENOUGH) as second:
            training("torchvision", first, steps=1)
            assert second.train._slots.get is not None and len(folders(memory)) == 1
        assert len(folders(memory)) == 1
        (base,) = memory.iterdir()
        assert stat.S_IMODE(base.stat().st_mode) == 0o700
    assert list(memory.iterdir()) == []


def test_jobs_that_come_and_go_at_once_do_not_take_each_others_cache(root, memory):
    """Each opens, uses and leaves it many times: none fails, none finds it gone, and nothing stays."""
    data = open_data_set(root)

    def job(side: int) -> None:
        for _ in range(15):
            with cached(data, "ram", side) as mine:
                assert mine.train.pixels(side % 7)[0].shape[2] == 3
                assert (mine.train._slots.get(side % 7, mine.train.stamp(side % 7))) is not None
                assert len(folders(memory)) >= 1

    with ThreadPoolExecutor(4) as pool:  # each opening has locks of its own
        list(pool.map(job, [ENOUGH, ENOUGH, 90, 100]))
    assert list(memory.iterdir()) == []


HOLDER = """
import sys, time
from pathlib import Path
from horovod_owt.data import cache
from horovod_owt.data.store import open_data_set

cache.MEMORY = Path(sys.argv[2])
with cache.cached(open_data_set(Path(sys.argv[1])), "ram", int(sys.argv[3])) as data:
    for index in range(len(data.train)):
        data.train.pixels(index)
    print("ready", flush=True)
    time.sleep(1000)
"""


def test_what_a_killed_job_left_in_memory_the_next_one_takes_over_or_removes(root, memory, monkeypatch):
    holders = []
    for side in (ENOUGH, 100):
        command = [sys.executable, "-c", HOLDER, str(root), str(memory), str(side)]
        holders.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    assert [holder.stdout.readline() for holder in holders] == ["ready\n"] * 2
    data = open_data_set(root)
    with cached(data, "ram", 90):
        assert len(folders(memory)) == 3  # those of living jobs are left alone
    assert len(folders(memory)) == 2
    for holder in holders:
        holder.kill()
        assert holder.wait() == -signal.SIGKILL
        holder.stdout.close()
    without_reading(monkeypatch)
    monkeypatch.setattr(module, "expected_bytes", lambda *args: 0)
    with cached(data, "ram", ENOUGH) as mine:
        assert len(folders(memory)) == 1
        training("torchvision", mine, steps=3)
    assert folders(memory) == []


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


def test_without_shared_memory_cache_ram_is_refused(root, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MEMORY", tmp_path / "none")
    with pytest.raises(ConfigError, match="none: No such file"), cached(open_data_set(root), "ram", ENOUGH):
        pass


def test_the_expected_size_is_that_of_the_cache(root, memory):
    data = open_data_set(root)
    with cached(data, "ram", ENOUGH) as mine:
        sizes = [mine.train.pixels(index)[0].nbytes for index in range(len(mine.train))]
    expected = module.expected_bytes(data.train, ENOUGH) - module.REGION
    assert sum(sizes) < expected < 1.15 * sum(sizes)


def test_on_a_short_disk_older_caches_of_other_data_make_room(root, own, tmp_path, monkeypatch):
    place = tmp_path / "c"
    with cached(open_data_set(own), str(place), 0) as data:
        training("torchvision", data, steps=1)
    next((own / "train").rglob("*.JPEG")).unlink()
    with cached(open_data_set(own), str(place), 0) as data:
        training("torchvision", data, steps=1)
    assert len(folders(place)) == 2
    monkeypatch.setattr(module, "room_in", lambda folder, memory: 10**9 if len(folders(place)) < 3 else 0)
    with cached(open_data_set(root), str(place), 90) as data:
        assert data.train.pixels(0)
        assert len(folders(place)) == 2


def test_caches_of_other_data_stay_where_they_would_not_make_room_enough(root, own, tmp_path, monkeypatch):
    place = tmp_path / "c"
    with cached(open_data_set(own), str(place), 90) as data:
        assert data.train.pixels(0)
    next((own / "train").rglob("*.JPEG")).unlink()
    monkeypatch.setattr(module, "room_in", lambda folder, memory: 0)
    monkeypatch.setattr(module, "expected_bytes", lambda *args: 10**12)
    with cached(open_data_set(own), str(place), 90) as data:
        assert not isinstance(data.train, module.DecodedImages) and len(folders(place)) == 2


def test_a_cache_that_fails_costs_no_run(root, tmp_path, monkeypatch, caplog):
    data = open_data_set(root)
    plain = training("torchvision", data)
    with cached(data, str(tmp_path / "c"), 0) as mine:
        training("torchvision", mine, steps=1)

        def broken(*args):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "pread", broken)
        assert same(training("torchvision", mine), plain)
    assert [r.message for r in caplog.records].count(
        "the cache fails, nothing more is stored: Input/output error"
    ) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_another_users_folder_is_refused_in_a_line(root, memory, tmp_path):
    theirs = memory / f"horovod_owt-{os.geteuid()}"
    theirs.mkdir()
    os.chown(theirs, 65534, 65534)
    with (
        pytest.raises(ConfigError, match="belongs to another user") as caught,
        cached(open_data_set(root), "ram", ENOUGH),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_a_place_that_cannot_be_used_is_refused_in_a_line(root, tmp_path):
    data = open_data_set(root)
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "missing" / "folder", "/proc/cache"):
        with (
            pytest.raises(ConfigError, match=f"cache={place}: .*; wanted a folder of this user") as caught,
            cached(data, str(place), 0),
        ):
            pass
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "saw"),
    [
        (["cache=disk"], "cache=disk; wanted none, ram or an absolute path"),
        (["cache="], "cache=; wanted none, ram or an absolute path"),
        (["cache_side=256"], "cache_side=256 without a cache"),
        (["cache=ram", "cache_side=200"], "cache_side=200 with crops of 224 px; wanted at least 224"),
        (["cache=ram", "cache_side=20000"], "cache_side=20000; wanted between 0 and 10000"),
        (["cache=ram", "cache_side=big"], "cache_side=big; wanted a whole number"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, saw):
    with pytest.raises(ConfigError) as caught:
        resolve(None, settings)
    assert str(caught.value).startswith(saw) and "\n" not in str(caught.value)


def test_the_side_follows_the_largest_crop():
    assert resolve(None, ["cache=ram"]).cached_side() == 256
    assert resolve(None, ["cache=ram", "cache_side=300"]).cached_side() == 300
    assert resolve(None, ["cache=/scratch"]).cached_side() == 0
    assert resolve(None, ["cache=ram", "image_size=[[0, 128], [1, 288], [2, 224]]"]).cached_side() == 329
