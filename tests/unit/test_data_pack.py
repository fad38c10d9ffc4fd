import hashlib
import io
import os
import pickle
import shutil
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from horovod_owt.data import arrays, retry, shards
from horovod_owt.data.build import Form
from horovod_owt.data.feed import TrainFeed, ValidationFeed
from horovod_owt.data.machine import is_of_the_file
from horovod_owt.data.pack import pack
from horovod_owt.data.resize import shrunk
from horovod_owt.data.shards import ShardStore
from horovod_owt.data.store import open_data_set
from horovod_owt.data.synthetic import write_synthetic
from horovod_owt.errors import DataError

pytestmark = pytest.mark.timeout(60)
LONG = b"a-name-of-more-than-100-bytes" * 5
ODD = {b"caf\xe9.jpg": b"latin", b"a.b.c.JPEG": b"dots", LONG + b".JPEG": b"long", b"\xc3\xa4 o.PNG": b"png"}


def tree(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """folder/: synthetic images; packed/: the same in three training shards."""
    root = tmp_path_factory.mktemp("data")
    write_synthetic(
        root / "folder", classes=3, train_per_class=90, val_per_class=5, size=(96, 128), workers=1
    )
    pack(root / "folder", root / "packed", Form(shard_mb=1), workers=1)
    return root


@pytest.fixture
def odd(tmp_path):
    """Two classes of files with odd names; nobody looks inside them."""
    for split in ("train", "val"):
        for name in ("n 1", "n.2"):
            folder = tmp_path / "odd" / split / name
            folder.mkdir(parents=True)
            for file, data in ODD.items():
                Path(os.fsdecode(os.path.join(os.fsencode(folder), file))).write_bytes(data + name.encode())
    return tmp_path / "odd"


def rows(batches) -> list[tuple]:
    return [
        (
            b.indices.tolist(),
            b.labels.tolist(),
            [bytes(j) for j in b.images],
            b.windows.tolist(),
            b.flips.tolist(),
        )
        for b in batches
    ]


def test_folder_and_shards_yield_the_same_batches(root):
    def batches(name: str) -> tuple:
        data = open_data_set(root / name)
        with TrainFeed(data.train, seed=3, batch=25) as train, ValidationFeed(data.val, batch=4) as val:
            return data.classes, rows(islice(train, 13)), rows(val)  # 13 batches: an epoch and a half

    assert len(list((root / "packed" / "train").glob("*.tar"))) >= 3
    assert batches("folder") == batches("packed")


def test_bytes_do_not_depend_on_the_number_of_workers(root, tmp_path):
    pack(root / "folder", tmp_path / "two", Form(shard_mb=1), workers=2)
    assert tree(tmp_path / "two") == tree(root / "packed")


def test_any_tar_reader_finds_an_image_and_its_label_one_after_the_other(root):
    store, seen = open_data_set(root / "folder").train, set()
    by_key = {
        f"{store.classes[store.labels[i]]}/{os.fsdecode(store.name(i))[:-5]}": i for i in range(len(store))
    }
    for file in sorted((root / "packed" / "train").glob("*.tar")):
        with tarfile.open(file, "r|") as archive:  # front to back, as WebDataset reads
            pairs = [(m.name, archive.extractfile(m).read(), m) for m in archive]
        labels = []
        for (image, data, header), (label, text, _) in zip(pairs[::2], pairs[1::2], strict=True):
            key = image.removesuffix(".jpg")
            assert label == key + ".cls" and data == store.read(by_key[key])
            assert int(text) == store.labels[by_key[key]]
            assert (header.mtime, header.uid, header.gid, header.uname, header.mode) == (0, 0, 0, "", 0o644)
            labels.append(int(text))
            seen.add(key)
        assert len(set(labels[:20])) == 3  # the classes are mixed
    assert seen == set(by_key)


def test_tar_x_unpacks_to_a_folder(root, odd, tmp_path):
    pack(odd, tmp_path / "odd-packed", Form(), workers=1)
    for source, packed in [(root / "folder", root / "packed"), (odd, tmp_path / "odd-packed")]:
        out = tmp_path / f"unpacked-{source.name}"
        for split in ("train", "val"):
            (out / split).mkdir(parents=True)
            for file in sorted((packed / split).glob("*.tar")):
                subprocess.run(["tar", "xf", file, "-C", out / split], check=True)
        before, after = open_data_set(source), open_data_set(out)
        assert after.classes == before.classes
        samples = [{(s.labels[i], s.read(i)) for i in range(len(s))} for s in (before.train, after.train)]
        assert samples[0] == samples[1] and len(samples[0]) == len(before.train)


def test_odd_names_are_kept_but_for_dots(odd, tmp_path):
    pack(odd, tmp_path / "packed", Form(), workers=1)
    before, after = open_data_set(odd).train, open_data_set(tmp_path / "packed").train
    assert [after.read(i) for i in range(8)] == [before.read(i) for i in range(8)]
    names = {after.name(i) for i in range(8)}
    assert names == {b"caf\xe9.jpg", b"a_b_c.jpg", LONG + b".jpg", b"\xc3\xa4 o.png"}


@pytest.mark.parametrize("twin", ["a_b_c.jpg", "a.b.c.png"])
def test_names_that_would_be_one_key_are_refused(odd, twin, tmp_path):
    (odd / "val" / "n.2" / twin).touch()
    with pytest.raises(DataError, match=r"a\.b\.c\.JPEG.* would both be a_b_c in a shard; .*rename"):
        pack(odd, tmp_path / "packed", Form(), workers=1)


def test_damage_is_found_by_the_checksum(root, tmp_path):
    pack(root / "folder", tmp_path / "packed", Form(), workers=1)
    store = open_data_set(tmp_path / "packed").train
    assert all(store.check(i, store.read(i)) is None for i in range(len(store)))
    shard = tmp_path / "packed" / "train" / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    at = data.index(store.read(7)) + 100
    data[at] ^= 1
    shard.write_bytes(data)
    bad = {i: fault for i in range(len(store)) if (fault := store.check(i, store.read(i)))}
    assert list(bad) == [7] and "crc32" in bad[7]
    with pytest.raises(DataError, match="n00000000_00007.jpg is damaged: crc32"):
        pack(tmp_path / "packed", tmp_path / "again", Form(), workers=1)


def test_a_shard_truncated_or_lost_during_training_is_no_fault_of_an_image(root, tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "PAUSES_S", ())
    pack(root / "folder", tmp_path / "packed", Form(), workers=1)
    store = open_data_set(tmp_path / "packed").val
    shard = tmp_path / "packed" / "val" / "shard-000000.tar"
    store.read(0)
    os.truncate(shard, 600)
    with pytest.raises(OSError, match="the shard ends within the sample") as caught:
        [store.read(i) for i in range(len(store))]
    assert not is_of_the_file(caught.value)
    shard.unlink()
    store = ShardStore([shard], store._index)
    with pytest.raises(OSError, match="shard-000000.tar: No such file") as caught:
        store.read(0)
    assert not is_of_the_file(caught.value)


@pytest.mark.parametrize(
    ("damage", "saw"),
    [
        (
            lambda train: (train / "shard-000001.tar").unlink(),
            "shard-000001.tar cannot be read: No such file",
        ),
        (
            lambda train: os.truncate(train / "shard-000001.tar", 7),
            r"shard-000001.tar has 7 bytes; wanted \d+",
        ),
        (lambda train: os.truncate(train / "index.npz", 700), "index.npz cannot be used: "),
        (lambda train: (train / "index.npz").unlink(), "train has shards, but no index.npz; "),
    ],
)
def test_a_packed_set_that_is_not_whole_is_refused(root, tmp_path, damage, saw):
    pack(root / "folder", tmp_path / "packed", Form(shard_mb=1), workers=1)
    damage(tmp_path / "packed" / "train")
    with pytest.raises(DataError, match=saw) as caught:
        open_data_set(tmp_path / "packed")
    assert "\n" not in str(caught.value) and caught.value.fix


def test_threads_share_a_store_that_may_hold_few_files_open(root, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_FILES", 1)
    plain, store = open_data_set(root / "folder").train, open_data_set(root / "packed").train
    indices = np.random.default_rng(0).integers(0, len(store), 3000).tolist()
    files = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(store.read, indices))
    assert read == [plain.read(i) for i in indices]
    assert len(os.listdir("/proc/self/fd")) <= files + 1


def test_a_store_survives_the_way_to_another_process(root):
    store = open_data_set(root / "packed").val
    store.read(0)
    assert pickle.loads(pickle.dumps(store)).read(3) == store.read(3)


def test_a_packed_sample_costs_less_than_100_bytes():
    count = 100_000
    names = shards.Names.joined(b"n01440764_%d.jpg" % number for number in range(count))
    zeros = np.zeros(count, np.uint32)
    index = shards.Index(
        [b"n01"], np.array([9]), zeros, zeros * np.int64(1), zeros, zeros.astype(int), zeros, names
    )
    columns = [index.shard, index.offset, index.length, index.label, index.crc32, names.ends]
    assert (sum(column.nbytes for column in columns) + len(names.blob)) / count < 100


def test_images_are_made_smaller_and_small_ones_copied(root, tmp_path):
    pack(root / "folder", tmp_path / "small", Form(short_side=110), workers=1)
    before, after = open_data_set(root / "folder").train, open_data_set(tmp_path / "small").train
    copied = 0
    for index in range(len(before)):
        old, new = before.read(index), after.read(index)
        old_size, new_size = Image.open(io.BytesIO(old)).size, Image.open(io.BytesIO(new)).size
        copied += old == new
        assert (old == new) == (min(old_size) <= 110) and (old == new or min(new_size) == 110)
        assert abs(new_size[0] / new_size[1] - old_size[0] / old_size[1]) < 0.02
    assert 20 < copied < 250


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("L", "JPEG"), ("RGBA", "PNG"), ("P", "PNG")])
def test_a_smaller_image_is_an_ordinary_one_of_the_same_colours(mode, kind):
    image, out = Image.new("RGB", (90, 60), (200, 60, 30)), io.BytesIO()
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    image.save(out, kind)
    small = Image.open(io.BytesIO(shrunk(out.getvalue(), 30)))
    wanted = Image.open(io.BytesIO(out.getvalue())).convert("L" if mode == "L" else "RGB")
    assert small.size == (45, 30) and small.format == "JPEG" and small.mode == wanted.mode
    differ = np.abs(np.asarray(small, float)[9, 9] - np.asarray(wanted, float)[9, 9])
    assert differ.max() <= 4


def test_an_image_that_cannot_be_made_smaller_is_copied_and_named(root, tmp_path, caplog):
    write_synthetic(tmp_path / "set", classes=1, train_per_class=3, val_per_class=1, size=(60, 70), workers=1)
    bad = next((tmp_path / "set" / "train").glob("*/*_00001.JPEG"))
    bad.write_bytes(bad.read_bytes()[:-400])
    pack(tmp_path / "set", tmp_path / "small", Form(short_side=40), workers=1)
    assert open_data_set(tmp_path / "small").train.read(1) == bad.read_bytes()
    assert f"copied unchanged: {bad}: " in caplog.text and "truncated" in caplog.text


@pytest.mark.parametrize(
    ("source", "out", "saw"),
    [
        ("folder", "folder", "is .*folder itself"),
        ("folder", "folder/train/packed", "are nested"),
        ("packed/..", "packed/new", "are nested"),
        ("nowhere", "new", "nowhere does not exist"),
        ("empty", "new", "empty is empty: no folder train nor val"),
        ("folder", "mine", "is not empty: it contains thesis.tex"),
        ("folder", "packed", r"contains another data set \(shard_mb 1, not 256\)"),
        ("folder", "file", "is a file"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(root, source, out, saw):
    (root / "empty").mkdir(exist_ok=True)
    (root / "mine").mkdir(exist_ok=True)
    (root / "mine" / "thesis.tex").touch()
    (root / "file").touch()
    before = tree(root)
    with pytest.raises(DataError, match=saw) as caught:
        pack(root / source, root / out, Form(), workers=1)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert tree(root) == before and not (root / "new").exists()


def test_the_same_command_finds_its_work_done_until_the_source_changes(odd, tmp_path):
    first = pack(odd, tmp_path / "packed", Form(), workers=1)
    before = tree(tmp_path / "packed")
    assert first[1] and not pack(odd, tmp_path / "packed", Form(), workers=1)[1]
    (odd / "train" / "n 1" / "a.b.c.JPEG").write_bytes(b"other")
    with pytest.raises(DataError, match="contains another data set .source_sha256 "):
        pack(odd, tmp_path / "packed", Form(), workers=1)
    assert tree(tmp_path / "packed") == before


def test_a_set_that_has_lost_a_split_is_not_called_there(odd, tmp_path):
    pack(odd, tmp_path / "packed", Form(), workers=1)
    shutil.rmtree(tmp_path / "packed" / "val")
    with pytest.raises(DataError, match="packed was complete, and has no folder val now; .* remove it"):
        pack(odd, tmp_path / "packed", Form(), workers=1)


def test_a_disk_that_is_too_small_is_reported_before_it_is_filled(root, tmp_path, monkeypatch):
    real = os.statvfs

    class Nearly:
        def __init__(self, path):
            self.f_blocks = self.f_bavail = 100
            self.f_frsize, self.f_files, self.f_favail = 4096, 0, 0

    monkeypatch.setattr("horovod_owt.filesystem.os.statvfs", Nearly)
    with pytest.raises(DataError, match=r"on a disk with 0.4 MB free; wanted \d.\d MB; fix: free some"):
        pack(root / "folder", tmp_path / "packed", Form(), workers=1)
    assert not list((tmp_path / "packed").rglob("*.tar"))
    monkeypatch.setattr("horovod_owt.filesystem.os.statvfs", real)
    assert pack(root / "folder", tmp_path / "packed", Form(), workers=1)[1]  # the same command goes on


def test_a_write_error_is_reported_and_the_same_command_continues(root, tmp_path, monkeypatch):
    real = os.fsync

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("horovod_owt.filesystem.os.fsync", full)
    with pytest.raises(DataError, match="cannot write to .*packed: No space left on device; fix: "):
        pack(root / "folder", tmp_path / "packed", Form(shard_mb=1), workers=1)
    monkeypatch.setattr("horovod_owt.filesystem.os.fsync", real)
    assert pack(root / "folder", tmp_path / "packed", Form(shard_mb=1), workers=1)[1]
    assert tree(tmp_path / "packed") == tree(root / "packed")


class Order:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, folder) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_an_index_with_pickles_runs_nothing(root, tmp_path):
    split = shutil.copytree(root / "packed" / "train", tmp_path / "train")
    with np.load(split / "index.npz") as index:
        arrays = {**index, "label": np.array([Order(tmp_path / "ran")], object)}
    np.savez(split / "index.npz", **arrays)
    with pytest.raises(DataError, match="cannot be used: Object arrays"):
        ShardStore.open(split)
    assert not (tmp_path / "ran").exists()


def test_a_large_index_is_mapped_and_as_correct(root, monkeypatch):
    """So that the ranks of a host share it, and only what is used of it is in memory."""
    copied = open_data_set(root / "packed")
    monkeypatch.setattr(arrays, "MAP_FROM", 1)
    mapped = open_data_set(root / "packed")
    index = mapped.train._index
    columns = [index.shard, index.offset, index.length, index.label, index.crc32]
    assert all(isinstance(each, np.memmap) for each in [*columns, index.names.blob, index.names.ends])
    assert mapped.fingerprint() == copied.fingerprint()
    assert [mapped.train.read(i) for i in range(len(mapped.train))] == [
        copied.train.read(i) for i in range(len(copied.train))
    ]


@pytest.mark.parametrize("from_end", [8, 200])
def test_a_damaged_index_is_noticed_if_it_is_mapped_too(tmp_path, monkeypatch, from_end):
    monkeypatch.setattr(arrays, "MAP_FROM", 1)
    path = tmp_path / "index.npz"
    arrays.write_arrays(path, {"ends": np.arange(1000)})
    written = bytearray(path.read_bytes())
    middle = len(written) // 2
    written[middle] ^= 1
    path.write_bytes(written)
    with pytest.raises(arrays.UNREADABLE):
        arrays.read_arrays(path)
    path.write_bytes(written[:-from_end])
    with pytest.raises(arrays.UNREADABLE):
        arrays.read_arrays(path)


def test_a_store_goes_to_another_process_without_its_index(root):
    store = open_data_set(root / "packed").train
    assert len(pickle.dumps(store)) < 1000


def test_of_many_shards_few_are_asked_for_their_size_and_all_must_be_there(root, tmp_path, monkeypatch):
    """Every rank would ask the file server for each of half a million shards."""
    packed = tmp_path / "packed"
    shutil.copytree(root / "packed", packed)
    monkeypatch.setattr(shards, "SIZES_CHECKED", 2)  # of three
    asked, stat = [], os.stat
    monkeypatch.setattr(shards.os, "stat", lambda path, **how: (asked.append(Path(path).name), stat(path))[1])
    ShardStore.open(packed / "train")
    assert [name for name in asked if name.endswith(".tar")] == ["shard-000000.tar", "shard-000002.tar"]
    (packed / "train" / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match="shard-000001.tar cannot be read: No such file"):
        ShardStore.open(packed / "train")
