"""What is a bad image, and what becomes of its row."""

import importlib.util
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_files import BAD, ODD, encoded, undecodable, with_stray_marker

from horovod_owt.data.decode import pillow_fault
from horovod_owt.data.faults import BadImages, check_image
from horovod_owt.data.feed import IGNORED, TrainFeed, ValidationFeed
from horovod_owt.data.folder import FolderStore
from horovod_owt.data.order import SampleOrder
from horovod_owt.data.pipeline import make_pipeline
from horovod_owt.data.store import open_data_set
from horovod_owt.data.synthetic import write_synthetic
from horovod_owt.errors import RunError

pytestmark = pytest.mark.timeout(60)

needs_dali = pytest.mark.skipif(not importlib.util.find_spec("nvidia.dali"), reason="DALI is not installed")
KINDS = [pytest.param("dali", marks=needs_dali), "torchvision"]


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_found(kind):
    data, fault = BAD[kind]
    if fault == "undecodable":
        check_image(data)
        assert pillow_fault(data)
    else:
        with pytest.raises(ValueError, match=fault):
            check_image(data)


@pytest.mark.parametrize(
    "data",
    [
        *(data for data, _ in ODD.values()),
        encoded("PNG") + b"\0" * 100,
        encoded() + b"\0" * 5000,  # padded by a camera or a file system
        encoded() + b"junk" * 1000,
        encoded(progressive=True) + b"\n",
        encoded("BMP"),
    ],
)
def test_odd_files_are_whole(data):
    assert check_image(data)[:2] == (90, 120)


def test_the_end_of_an_embedded_thumbnail_is_not_the_images():
    small, jpeg = encoded(size=(40, 30)), encoded()
    exif = b"Exif\0\0" + small
    jpeg = jpeg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + jpeg[2:]
    assert check_image(jpeg)[:2] == (90, 120)
    with pytest.raises(ValueError, match="truncated"):
        check_image(jpeg[:-700])


def test_a_file_without_end_marker_is_good_if_pillow_decodes_it():
    check_image(encoded()[:-2] + b"\0" * 200)
    with pytest.raises(ValueError, match="truncated"):
        check_image(encoded()[:-2])  # here some bits of the last row are gone


# ---- in the pipelines ----

IMAGES, BATCH = 38, 4  # the last batch is padded
# a whole batch, two in a row of batches, in the first and in the padded one
UNDECODABLE, CHEAP = [0, 13, 14, 15, 30, 37], [8, 9, 10, 11, 12, 33]
DAMAGED = {**dict.fromkeys(UNDECODABLE, undecodable()), **dict.fromkeys(CHEAP, encoded()[:-700])}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    root = tmp_path_factory.mktemp("sound") / "set"
    how = dict(classes=1, train_per_class=IMAGES, val_per_class=IMAGES, size=(80, 100), workers=1)
    write_synthetic(root, **how)
    return root


@pytest.fixture(scope="module")
def damaged(sound, tmp_path_factory):
    root = shutil.copytree(sound, tmp_path_factory.mktemp("damaged") / "set")
    data = open_data_set(root)
    for store in (data.train, data.val):
        for index, damage in DAMAGED.items():
            Path(store.path(index)).write_bytes(damage)
    return root


def run(kind, feed, steps=None):
    with make_pipeline(kind, feed, image_size=64, device_id=None, num_threads=2) as pipe:
        return list(islice(pipe, steps))


@pytest.mark.parametrize("kind", KINDS)
def test_no_sample_is_lost_repeated_or_changed_around_bad_ones(sound, damaged, kind):
    sound, store, known = open_data_set(sound).val, open_data_set(damaged).val, BadImages()
    whole = run(kind, ValidationFeed(sound, batch=BATCH))
    for _ in range(2):
        batches = run(kind, ValidationFeed(store, batch=BATCH, bad_images=known))
        assert [b.indices.tolist() for b in batches] == [b.indices.tolist() for b in whole]
        met = {}
        for mine, theirs in zip(batches, whole, strict=True):
            met |= mine.bad_images()
            for row, index in enumerate(mine.indices.tolist()):
                good = bool(theirs.valid[row]) and index not in DAMAGED
                assert bool(mine.valid[row]) == good
                assert mine.labels[row] == (theirs.labels[row] if good else IGNORED)
                if good:
                    assert torch.equal(mine.images[row], theirs.images[row])
            assert torch.isfinite(mine.images).all()
        assert met.keys() == DAMAGED.keys()
        assert all("undecodable" in met[index] for index in UNDECODABLE)
        assert all("truncated" in met[index] for index in CHEAP)


@pytest.mark.parametrize("kind", KINDS)
def test_training_continues_in_order_for_epochs(damaged, kind, monkeypatch):
    store, known = open_data_set(damaged).train, BadImages()
    read = []
    monkeypatch.setattr(
        type(store), "read", lambda self, index: read.append(index) or whole_read(self, index)
    )
    steps = 3 * IMAGES // BATCH
    batches = run(kind, TrainFeed(store, seed=3, batch=BATCH, bad_images=known), steps)
    _, order = SampleOrder(IMAGES, 3).at(0, steps * BATCH)
    assert np.concatenate([b.indices for b in batches]).tolist() == order.tolist()
    valid = torch.cat([b.valid for b in batches]).tolist()
    assert valid == [index not in DAMAGED for index in order.tolist()]
    assert all(b.valid[row] == (row not in b.faults) for b in batches for row in range(BATCH))
    # what is known to be bad is not read again, but for what was read ahead before it was known
    assert max(read[IMAGES + 6 * BATCH :].count(index) for index in DAMAGED) == 0
    assert min(read.count(index) for index in range(IMAGES) if index not in DAMAGED) >= 2


whole_read = FolderStore.read


def test_an_unreadable_file_is_tried_again(sound, tmp_path):
    store = open_data_set(shutil.copytree(sound, tmp_path / "set")).val
    away = Path(store.path(5)).rename(tmp_path / "away")
    known = BadImages()
    with ValidationFeed(store, batch=IMAGES, bad_images=known) as feed:
        assert "unreadable: No such file" in next(feed).faults[5]
    away.rename(store.path(5))
    with ValidationFeed(store, batch=IMAGES, bad_images=known) as feed:
        assert next(feed).valid.all()


@needs_dali
def test_a_failure_of_dali_that_is_no_images_ends_the_run(damaged, monkeypatch):
    from horovod_owt.data import pipeline_dali

    monkeypatch.setattr(pipeline_dali, "find_refused", lambda build, inputs: [])
    with pytest.raises(RunError, match="DALI failed on .* fix: --set pipeline=torchvision"):
        run("dali", ValidationFeed(open_data_set(damaged).val, batch=BATCH, bad_images=BadImages()))


class Broken:
    """A pipeline of DALI on a GPU that it has no kernels for."""

    def __init__(self, source):
        self.schedule_run = source

    def share_outputs(self):
        raise RuntimeError("no kernel image is available")

    run = share_outputs


@needs_dali
def test_a_dali_that_fails_on_every_image_ends_the_run(sound, monkeypatch):
    from horovod_owt.data.pipeline_dali import DaliPipeline

    monkeypatch.setattr(DaliPipeline, "_build", lambda self, source, **_: Broken(source))
    with pytest.raises(RunError, match="DALI fails on the JPEG too .*: no kernel image is available; fix: "):
        run("dali", ValidationFeed(open_data_set(sound).val, batch=BATCH, bad_images=BadImages()))


@needs_dali
@pytest.mark.parametrize(
    ("data", "dali", "torchvision"),
    [
        (with_stray_marker(), None, "undecodable: broken data stream"),
        (encoded("GIF"), "unsupported format GIF", "unsupported format GIF"),
    ],
)
def test_each_decoder_has_the_last_word_on_what_it_decodes(sound, tmp_path, data, dali, torchvision):
    store = open_data_set(shutil.copytree(sound, tmp_path / "set")).val
    Path(store.path(6)).write_bytes(data)
    for kind, fault in (("dali", dali), ("torchvision", torchvision)):
        batches = run(kind, ValidationFeed(store, batch=BATCH, bad_images=BadImages()))
        met = {index: text for batch in batches for index, text in batch.bad_images().items()}
        assert met.keys() == ({6} if fault else set())
        assert not fault or fault in met[6]


@needs_dali
def test_many_bad_images_of_a_kind_cost_dali_one_new_pipeline(sound, tmp_path, monkeypatch):
    from horovod_owt.data.pipeline_dali import DaliPipeline

    store = open_data_set(shutil.copytree(sound, tmp_path / "set")).train
    for index in range(0, IMAGES, 2):
        Path(store.path(index)).write_bytes(undecodable())
    begun, real = [], DaliPipeline._begin
    monkeypatch.setattr(DaliPipeline, "_begin", lambda self: begun.append(1) or real(self))
    batches = run("dali", TrainFeed(store, seed=0, batch=2, bad_images=BadImages()), IMAGES // 2)
    met = {index for batch in batches for index in batch.bad_images()}
    assert met == set(range(0, IMAGES, 2))
    # the first, and one for each batch that was read before the kind was known; not one for each bad image
    assert len(begun) <= 10 < IMAGES // 2


def test_what_a_decoder_says_of_a_placeholder_is_no_fault_of_the_image_it_stands_for(sound):
    """A file that is unreadable for a moment would be left out for good."""
    bad_images = BadImages()
    with TrainFeed(open_data_set(sound).train, seed=0, batch=4, bad_images=bad_images) as feed:
        gone = feed.without(next(feed), {1: "unreadable: No such file"})
        feed.without(gone, {0: "undecodable: by DALI", 1: "undecodable: by DALI"})
    faults = [bad_images.fault(int(index)) for index in gone.indices]
    assert faults == ["undecodable: by DALI", None, None, None]
