import errno
import logging
import os
import shutil

import pytest

from horovod_owt.data import retry
from horovod_owt.data.build import Form
from horovod_owt.data.folder import FolderStore
from horovod_owt.data.pack import pack
from horovod_owt.data.store import open_data_set
from horovod_owt.data.synthetic import write_synthetic


@pytest.fixture
def pauses(monkeypatch):
    """The pauses, which take no time here; no file has been warned of yet."""
    slept = []
    monkeypatch.setattr(retry.time, "sleep", slept.append)
    monkeypatch.setattr(retry, "_warned", set())
    return slept


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_synthetic(root / "folder", classes=2, train_per_class=3, val_per_class=1, size=(32, 48), workers=1)
    pack(root / "folder", root / "packed", Form(), workers=1)
    return root


def failing(monkeypatch, codes: list[int]):
    """The next reads of either store fail with these codes, one after another."""

    def wrapped(real):
        def call(*args, **how):
            if codes:
                code = codes.pop(0)
                raise OSError(code, os.strerror(code))
            return real(*args, **how)

        return call

    monkeypatch.setattr("horovod_owt.data.folder.open", wrapped(open), raising=False)
    monkeypatch.setattr("horovod_owt.data.shards.os.pread", wrapped(os.pread))


@pytest.mark.parametrize("kind", ["folder", "packed"])
def test_a_passing_fault_is_waited_for_and_warned_of_once(root, kind, pauses, monkeypatch, caplog):
    store = open_data_set(root / kind).train
    whole = store.read(2)
    failing(monkeypatch, [errno.EIO, errno.ESTALE])
    with caplog.at_level(logging.WARNING):
        assert store.read(2) == whole and pauses == [0.5, 2.0]
        failing(monkeypatch, [errno.ETIMEDOUT, errno.EMFILE])
        assert store.read(2) == whole
    assert len(caplog.records) == 1 and store.path(2) in caplog.text and "Input/output error" in caplog.text


@pytest.mark.parametrize("kind", ["folder", "packed"])
def test_a_lasting_fault_is_raised_after_three_tries(root, kind, pauses, monkeypatch):
    store = open_data_set(root / kind).train
    failing(monkeypatch, codes := [errno.EIO] * 5)
    with pytest.raises(OSError) as caught:
        store.read(0)
    assert caught.value.errno == errno.EIO and len(codes) == 2 and pauses == [0.5, 2.0]


def test_a_missing_file_is_not_waited_for(root, pauses, tmp_path):
    (tmp_path / "n01").mkdir()
    (tmp_path / "n01" / "a.jpg").touch()
    store = FolderStore(tmp_path)
    (tmp_path / "n01" / "a.jpg").unlink()
    with pytest.raises(FileNotFoundError):
        store.read(0)
    assert pauses == []


def test_a_stale_shard_is_reopened(root, pauses, monkeypatch):
    store, opened, real = open_data_set(root / "packed").train, [], os.open

    def spy(path, *how, **more):
        opened.append(path)
        return real(path, *how, **more)

    monkeypatch.setattr("horovod_owt.data.shards.os.open", spy)
    before = store.read(1)
    assert store.read(1) == before and len(opened) == 1  # and kept
    failing(monkeypatch, [errno.ESTALE])
    assert store.read(1) == before and len(opened) == 2


def test_a_shard_that_was_replaced_by_another_is_not_read(root, pauses, tmp_path):
    packed = shutil.copytree(root / "packed", tmp_path / "packed")
    store = open_data_set(packed).train
    with (packed / "train" / "shard-000000.tar").open("ab") as shard:
        shard.write(bytes(512))
    with pytest.raises(OSError, match="the file has .* bytes, .* in index.npz"):
        store.read(0)


def test_a_read_that_returns_less_is_continued(root, monkeypatch):
    """As on network file systems."""
    store, pread = open_data_set(root / "packed").train, os.pread
    whole = store.read(1)
    monkeypatch.setattr(os, "pread", lambda file, length, offset: pread(file, min(length, 100), offset))
    assert store.read(1) == whole
