"""Errors of the machine are never called the fault of an image, and never leave one out."""

import errno
import os
import resource
from importlib.util import find_spec

import pytest
from click.testing import CliRunner

from horovod_owt.cli import cli
from horovod_owt.data import decode, machine, retry, shards, verify
from horovod_owt.data.build import Form
from horovod_owt.data.faults import BadImages
from horovod_owt.data.feed import ValidationFeed
from horovod_owt.data.machine import EXHAUSTED, is_of_the_file
from horovod_owt.data.pack import pack
from horovod_owt.data.pipeline import make_pipeline
from horovod_owt.data.stats import data_stats
from horovod_owt.data.store import open_data_set
from horovod_owt.data.synthetic import write_synthetic
from horovod_owt.errors import DataError, RunError, fix_of
from horovod_owt.preflight import host
from horovod_owt.preflight import run as preflight_run

pytestmark = pytest.mark.timeout(60)
needs_dali = pytest.mark.skipif(not find_spec("nvidia.dali"), reason="DALI is not installed")
SYSTEM_ERRORS = [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ENOSPC]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_synthetic(root / "set", classes=2, train_per_class=4, val_per_class=6, size=(64, 80), workers=1)
    return root / "set"


@pytest.fixture
def broken_reads(monkeypatch):
    """Fail every read of image 3 of any store with this code."""
    monkeypatch.setattr(retry, "PAUSES_S", ())

    def fail_with(code: int) -> None:
        from horovod_owt.data.folder import FolderStore

        real = FolderStore._read_once

        def read(self, index):
            if index == 3:
                raise OSError(code, os.strerror(code), self._path(index))
            return real(self, index)

        monkeypatch.setattr(FolderStore, "_read_once", read)

    return fail_with


def test_what_is_of_the_file(tmp_path):
    (tmp_path / "there").touch(0o644)
    (tmp_path / "closed").touch(0o600)

    def error(code, name):
        return OSError(code, os.strerror(code), os.fsencode(tmp_path / name))

    assert is_of_the_file(error(errno.ENOENT, "gone"))
    assert is_of_the_file(error(errno.EISDIR, "there")) and is_of_the_file(error(errno.ELOOP, "there"))
    assert not is_of_the_file(error(errno.ENOENT, "no mount/gone"))
    assert is_of_the_file(error(errno.EACCES, "closed"))
    assert not is_of_the_file(error(errno.EACCES, "there"))
    assert not is_of_the_file(error(errno.EACCES, "no mount/there"))
    assert not is_of_the_file(MemoryError())
    for code in SYSTEM_ERRORS:
        assert not is_of_the_file(error(code, "there")) and fix_of(error(code, "there"))
    assert "ulimit -n" in fix_of(OSError(errno.EMFILE, "")) and "ulimit" not in fix_of(OSError(errno.EIO, ""))


@pytest.mark.parametrize("code", SYSTEM_ERRORS)
def test_skip_does_not_leave_a_good_image_out(root, broken_reads, code):
    broken_reads(code)
    store, known = open_data_set(root).val, BadImages()
    with ValidationFeed(store, batch=4, bad_images=known) as feed:
        with pytest.raises(RunError) as caught:
            next(feed)
    assert f"cannot read {store.path(3)}: {os.strerror(code)}; fix: " in str(caught.value)
    assert "bad image" not in str(caught.value) and known.fault(3) is None


def owt(*argv):
    return CliRunner().invoke(cli, ["data", *map(str, argv)], standalone_mode=False)


@pytest.mark.parametrize("code", SYSTEM_ERRORS)
def test_verify_keeps_unread_images_apart_from_bad_ones(root, broken_reads, code):
    broken_reads(code)
    done = owt("verify", root, "--split", "val", "--pipeline", "torchvision")
    assert isinstance(done.exception, RunError) and done.exception.exit_code == 1
    path = open_data_set(root).val.path(3)
    if code in EXHAUSTED:  # every later image would fail
        assert f"cannot read {path}: {os.strerror(code)}" in str(done.exception)
    else:
        assert f"unread  {path}: {os.strerror(code)}" in done.stdout and "0 bad" in done.stdout
        assert "1 images could not be read" in str(done.exception)


def test_statistics_do_not_skip_an_unread_image(root, broken_reads):
    broken_reads(errno.EIO)
    with pytest.raises(RunError, match="cannot read .*: Input/output error; fix: check the disk"):
        data_stats(open_data_set(root), sample=100)


@pytest.mark.parametrize("error", [MemoryError(), OSError("out of memory error when reading image file")])
def test_want_of_memory_is_no_fault_of_the_image_that_pillow_decodes(root, tmp_path, monkeypatch, error):
    class Short:
        @staticmethod
        def open(data):
            raise error

    monkeypatch.setattr(decode, "Image", Short)
    data = open_data_set(root)
    feed = ValidationFeed(data.val, batch=4, bad_images=BadImages())
    with make_pipeline("torchvision", feed, image_size=32, device_id=None, num_threads=1) as pipe:
        with pytest.raises(
            RunError, match=f"cannot decode {data.val.path(0)}: out of memory; fix: use fewer"
        ):
            next(pipe)
    with pytest.raises(RunError, match="out of memory"):
        data_stats(data, sample=3)
    with pytest.raises(RunError, match="out of memory"):
        decoder = verify.make_decoder("torchvision", threads=1, device_id=None)
        verify.verify({"val": data.val}, decoder, rank=0, world_size=1, progress=lambda done, bad: None)
    with pytest.raises(RunError, match="out of memory"):
        pack(root, tmp_path / "packed", Form(short_side=32), workers=1)


@needs_dali
def test_want_of_memory_is_no_fault_of_the_images_that_dali_decodes(root, monkeypatch):
    from horovod_owt.data.pipeline_dali import DaliPipeline

    feed = ValidationFeed(open_data_set(root).val, batch=4, bad_images=BadImages())
    with DaliPipeline(feed, image_size=32, device_id=None, num_threads=1) as pipe:

        class Short:
            def share_outputs(self):
                raise RuntimeError("Critical error in pipeline: std::bad_alloc")

            schedule_run = print

        pipe._pipe = Short()
        with pytest.raises(RunError, match="DALI cannot decode a batch: out of memory"):
            next(pipe)


@pytest.fixture
def packed(root, tmp_path, monkeypatch):
    """Ten shards of a few images each."""
    monkeypatch.setattr(Form, "shard_mb", 1)
    monkeypatch.setattr("horovod_owt.data.build.round", lambda size: 10, raising=False)
    pack(root, tmp_path / "packed", Form(), workers=1)
    assert len(list((tmp_path / "packed" / "val").glob("*.tar"))) == 10
    return tmp_path / "packed"


@pytest.fixture
def few_files():
    """Let this process open only so many files more, or one or two less."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def allow(more: int) -> None:
        used, limit = set(map(int, os.listdir("/proc/self/fd"))), 0
        while more:
            more -= limit not in used
            limit += 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))

    yield allow
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_shards_than_files_may_be_open_are_read(root, packed, few_files, monkeypatch):
    monkeypatch.setattr(retry, "PAUSES_S", ())
    monkeypatch.setattr(shards, "open_files_limit", lambda: 256)  # others took what was free
    plain, store = open_data_set(root).val, open_data_set(packed).val
    wanted = [plain.read(index) for index in range(len(plain))]
    few_files(3)
    assert [store.read(index) for index in range(len(store))] == wanted


def test_open_shards_leave_room_for_others(monkeypatch):
    for soft, most in [(112, 28), (1024, 256), (10**6, 256), (2, 1), (resource.RLIM_INFINITY, 256)]:
        monkeypatch.setattr(shards.resource, "getrlimit", lambda kind, soft=soft: (soft, soft))
        assert shards.open_files_limit() == most


def test_an_index_that_cannot_be_opened_now_is_not_called_damaged(packed, monkeypatch):
    def read(path):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    monkeypatch.setattr(shards.Index, "read", read)
    with pytest.raises(RunError, match="cannot read .*index.npz: Too many open files; fix: raise the limit"):
        open_data_set(packed)


def test_a_source_that_cannot_be_read_is_not_called_a_full_disk(root, tmp_path, broken_reads):
    broken_reads(errno.EMFILE)
    with pytest.raises(DataError, match="cannot read .*: Too many open files; fix: raise the limit"):
        pack(root, tmp_path / "packed", Form(), workers=1)


def test_preflight_judges_the_limit_that_training_would_have(monkeypatch):
    limits = [1024, 10**6]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, new: limits.__setitem__(slice(None), new))
    seen = []
    monkeypatch.setattr(
        preflight_run,
        "preflight",
        lambda topology, data, run_dir, tell: seen.append(host.limits(topology)["files"]),
    )
    assert CliRunner().invoke(cli, ["preflight"]).exit_code == 0
    assert seen == [machine.OPEN_FILES]


def test_the_soft_limit_of_open_files_is_raised(monkeypatch):
    asked = []
    monkeypatch.setattr(machine.resource, "setrlimit", lambda kind, limits: asked.append(limits))
    for limits in [(1024, 10**9), (256, 300), (20_000, 10**6), (-1, -1), (1024, -1)]:
        monkeypatch.setattr(machine.resource, "getrlimit", lambda kind, limits=limits: limits)
        machine.raise_open_file_limit()
    assert asked == [(16384, 10**9), (300, 300), (16384, -1)]
