"""What NFS, SMB, FUSE and other file systems refuse is handled; fake os functions play them."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from horovod_owt import filesystem
from horovod_owt.data import staging
from horovod_owt.errors import ConfigError, DataError
from horovod_owt.files import atomic_file, atomic_folder, remove_folder, write_text
from horovod_owt.filesystem import extend, free_space, locked, rename_folder, temporary_folder, touch

REFUSES_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(filesystem, "RETRY_WAITS_S", (0.0, 0.0))


def refuse(monkeypatch, module, name, code, *, when=lambda *args: True, times=None):
    """Let a function raise OSError(code), for these arguments, this often; returns the refused calls."""
    real, refused = getattr(module, name), []

    def fake(*args, **options):
        if when(*args) and (times is None or len(refused) < times):
            refused.append(args)
            raise OSError(code, os.strerror(code), *map(str, args[:1]))
        return real(*args, **options)

    monkeypatch.setattr(module, name, fake)
    return refused


def is_folder(descriptor) -> bool:
    return os.path.isdir(f"/proc/self/fd/{descriptor}")


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("code", REFUSES_SYNC)
@pytest.mark.parametrize("what", ["folders", "files and folders"])
def test_writes_are_complete_where_fsync_is_refused(tmp_path, monkeypatch, code, what):
    refused = refuse(monkeypatch, os, "fsync", code, when=is_folder if what == "folders" else lambda fd: True)
    write_text(tmp_path / "note", "text")
    with atomic_folder(tmp_path / "final", durable=True) as scratch:
        (scratch / "weights").write_text("1")
    assert (tmp_path / "note").read_text(encoding="utf-8") == "text" and (
        tmp_path / "final" / "weights"
    ).read_text(encoding="utf-8") == "1"
    assert refused


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE])
def test_an_fsync_that_fails_is_an_error(tmp_path, monkeypatch, code):
    write_text(tmp_path / "note", "old")
    refuse(monkeypatch, os, "fsync", code)
    with pytest.raises(OSError) as caught:
        write_text(tmp_path / "note", "new")
    assert caught.value.errno == code
    assert (tmp_path / "note").read_text(encoding="utf-8") == "old" and names(tmp_path) == ["note"]


@pytest.mark.parametrize("code", [errno.EBUSY, errno.ETXTBSY, errno.EACCES, errno.EPERM, errno.EEXIST])
@pytest.mark.parametrize("times", [1, None], ids=["for a moment", "for good"])
def test_an_open_file_is_replaced(tmp_path, monkeypatch, code, times):
    note = tmp_path / "note"
    note.write_text("old")
    refused = refuse(monkeypatch, os, "replace", code, when=lambda _, target: target.exists(), times=times)
    write_text(note, "new")
    assert note.read_text(encoding="utf-8") == "new" and names(tmp_path) == ["note"] and refused


def test_the_old_file_stays_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    note = tmp_path / "note"
    note.write_text("old")
    refuse(monkeypatch, os, "replace", errno.EBUSY)
    refuse(monkeypatch, os, "rename", errno.EIO, when=lambda source, target: target == note, times=1)
    with pytest.raises(OSError, match="Input/output"):
        write_text(note, "new")
    assert note.read_text(encoding="utf-8") == "old" and names(tmp_path) == ["note"]


def test_a_file_is_copied_where_folders_are_devices_of_their_own(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    refuse(monkeypatch, os, "replace", errno.EXDEV, when=lambda *names: names[0].parent != names[1].parent)
    synced, fsync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd)
    )
    with atomic_file(tmp_path / "file", folder=tmp_path / "scratch", durable=True) as file:
        file.write(b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    *_, copied, folder = synced  # the copy too, before it takes its name
    assert copied.endswith(".partial") and Path(copied).parent == tmp_path and folder == str(tmp_path)
    assert names(tmp_path) == ["file", "scratch"] and names(tmp_path / "scratch") == []


@pytest.mark.parametrize("name", "EXDEV EBUSY EACCES EPERM ENOTEMPTY ENOSYS EMFILE".split())
def test_a_folder_that_cannot_be_renamed_is_moved_file_by_file(tmp_path, monkeypatch, name):
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda *names: replace(*names) or moved.append(names[1].name))
    code = getattr(errno, name)
    refuse(monkeypatch, os, "replace", code, when=lambda source, _: source.is_dir())
    with atomic_folder(tmp_path / "final", durable=True, last="MANIFEST") as scratch:
        for name in ("MANIFEST", "a", "z", "sub/b"):
            (scratch / name).parent.mkdir(exist_ok=True)
            (scratch / name).write_text(name)
    assert sorted(moved[:-1]) == ["a", "b", "z"] and moved[-1] == "MANIFEST"  # which shows that all are there
    assert (tmp_path / "final" / "sub" / "b").read_text(encoding="utf-8") == "sub/b" and names(tmp_path) == [
        "final"
    ]


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS])
def test_a_folder_is_replaced_and_removed_where_none_can_be_renamed(tmp_path, monkeypatch, code):
    refuse(monkeypatch, os, "replace", code, when=lambda source, _: source.is_dir())
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "final", replace=True) as scratch:
            (scratch / text).write_text(text)
    assert names(tmp_path) == ["final"] and names(tmp_path / "final") == ["new"]
    remove_folder(tmp_path / "final")
    assert names(tmp_path) == []


def test_a_move_that_was_interrupted_is_continued(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in "abc":
        (source / name).write_text(name)
    refuse(monkeypatch, os, "replace", errno.EXDEV, when=lambda source, _: source.is_dir())
    with monkeypatch.context() as patch:
        refuse(patch, os, "replace", errno.ENOSPC, when=lambda source, _: source.name == "b")
        with pytest.raises(OSError, match="No space"):
            rename_folder(source, target, merge=True)
    assert names(source) == ["b", "c"]
    rename_folder(source, target, merge=True)
    assert names(tmp_path) == ["target"] and names(target) == ["a", "b", "c"]
    source.mkdir()
    (source / "d").write_text("d")
    with pytest.raises(OSError):  # somebody's folder
        rename_folder(source, target)
    assert names(target) == ["a", "b", "c"] and names(source) == ["d"]


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EIO])
def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch, code):
    with atomic_folder(tmp_path / "final") as scratch:
        (scratch / "old").touch()
    refuse(monkeypatch, os, "replace", errno.EXDEV, when=lambda s, _: s.is_dir() and any(s.glob("new*")))
    refuse(monkeypatch, os, "replace", code, when=lambda source, _: source.name == "new2")
    refuse(monkeypatch, shutil, "copyfile", errno.ENOSPC)
    with pytest.raises(OSError), atomic_folder(tmp_path / "final", replace=True) as scratch:
        (scratch / "new1").touch()
        (scratch / "new2").touch()
    assert names(tmp_path) == ["final"] and names(tmp_path / "final") == ["old"]


def linger(monkeypatch, *, times):
    """An open file of a folder stays, under another name, this often."""
    left = [times]
    rmdir = os.rmdir

    def fake(path, *args, **options):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        return rmdir(path, *args, **options)

    monkeypatch.setattr(os, "rmdir", fake)


def test_a_folder_is_removed_once_its_open_files_are_closed(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    linger(monkeypatch, times=2)
    remove_folder(tmp_path / "folder")
    assert names(tmp_path) == []


def test_a_modification_time_is_renewed_where_only_writing_does(tmp_path, monkeypatch):
    file = tmp_path / "owner"
    file.write_text("content")
    for code in (None, errno.EPERM, errno.EACCES, errno.ENOSYS):
        os.utime(file, (1, 1))
        with monkeypatch.context() as patch:
            if code:
                refuse(patch, os, "utime", code)
            touch(file)
        assert file.stat().st_mtime > 1e9 and file.read_text(encoding="utf-8") == "content"
    file.unlink()
    with pytest.raises(FileNotFoundError):
        touch(file)


def test_a_lock_excludes_and_a_file_system_without_locks_says_so(tmp_path, monkeypatch):
    with locked(tmp_path / "lock") as held:
        assert held
        with pytest.raises(BlockingIOError), locked(tmp_path / "lock"):
            pass
    for code, answer in ((errno.ENOLCK, False), (errno.ENOSYS, False), (errno.EACCES, None)):
        with monkeypatch.context() as patch:
            refuse(patch, fcntl, "flock", code)
            if answer is None:  # POSIX locks may answer so if another process holds it
                with pytest.raises(BlockingIOError), locked(tmp_path / "lock"):
                    pass
            else:
                with locked(tmp_path / "lock") as held:
                    assert held is answer


def test_free_space_that_is_not_reported_is_unknown_not_zero(tmp_path, monkeypatch):
    assert free_space(tmp_path)[0] > 0
    reserved = os.statvfs_result([4096, 4096, 100, 30, 20, 9, 9, 5, 0, 255])  # for root: 10 blocks
    monkeypatch.setattr(os, "statvfs", lambda _: reserved)
    assert free_space(tmp_path) == (20 * 4096, 5)
    zeros = os.statvfs_result([0] * 10)
    monkeypatch.setattr(os, "statvfs", lambda _: zeros)
    assert free_space(tmp_path) == (None, None)
    staging.check_room(tmp_path, 10**15, 10**9)
    refuse(monkeypatch, os, "statvfs", errno.ENOSYS)
    assert free_space(tmp_path) == (None, None)


def test_term_removes_a_temporary_folder_and_ends_the_process(tmp_path):
    code = (
        "import signal; from horovod_owt.filesystem import temporary_folder\n"
        "with temporary_folder('owt-') as folder:\n"
        "    (folder / 'file').write_text('')\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
    )
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, timeout=60)
    assert done.returncode == -signal.SIGTERM and not list(tmp_path.iterdir())


def test_a_forked_worker_that_is_ended_leaves_its_parents_temporary_folder():
    code = """
import os, signal, sys
from horovod_owt.filesystem import temporary_folder
with temporary_folder("owt-") as folder:
    worker = os.fork()
    if not worker:
        signal.raise_signal(signal.SIGTERM)
    _, status = os.waitpid(worker, 0)
    sys.exit(os.waitstatus_to_exitcode(status) != -signal.SIGTERM or not folder.is_dir())
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_file_that_cannot_be_extended_is_left_as_it_was(tmp_path, monkeypatch):
    def half_of_it(descriptor, start, length):
        os.ftruncate(descriptor, start + length // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", half_of_it)
    with open(tmp_path / "file", "w+b") as file:
        file.write(b"content")
        file.flush()
        with pytest.raises(OSError, match="No space"):
            extend(file.fileno(), 1000)
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_temporary_folder_leaves_a_handler_of_term_alone():
    mine = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with temporary_folder("owt-"):
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, mine)


def test_without_a_temporary_folder_the_error_names_tmpdir(monkeypatch):
    refuse(monkeypatch, filesystem.tempfile, "mkdtemp", errno.ENOENT)
    with pytest.raises(ConfigError, match="export TMPDIR="), temporary_folder("owt-"):
        pass


def test_a_data_set_is_finished_although_its_staging_folder_cannot_be_removed(tmp_path, monkeypatch, caplog):
    """As with a file of it that another process has open, on NFS."""
    spec, facts = {"made_by": "a test"}, {"images": 3}

    def make(place):
        for split in ("train", "val"):
            (place.folder / split).mkdir(exist_ok=True)
        place.finish(facts)

    with monkeypatch.context() as patch:
        linger(patch, times=10**6)
        with staging.opened(tmp_path / "out", spec) as place:
            make(place)
    assert "not needed any more, but stays" in caplog.text
    with staging.opened(tmp_path / "out", spec) as place:  # the same command again
        assert place.finished == {**spec, **facts}
    assert names(tmp_path / "out") == ["owt-data.json", "train", "val"]


def test_a_data_set_is_finished_where_folders_cannot_be_renamed_after_a_kill_too(tmp_path, monkeypatch):
    refuse(monkeypatch, os, "replace", errno.EXDEV, when=lambda source, _: source.is_dir())
    spec, out = {"made_by": "a test"}, tmp_path / "out"
    killed = refuse(monkeypatch, os, "replace", errno.EIO, when=lambda source, _: source.name == "2", times=1)
    for _ in range(2):
        try:
            with staging.opened(out, spec) as place:
                for split in ("train", "val") if not (out / "train").exists() else ():
                    (place.folder / split).mkdir()
                    for name in "123":
                        (place.folder / split / name).write_text(name)
                assert not place.split_is_done("train")
                place.finish({})
        except DataError as error:
            assert "Input/output" in str(error) and not place.finished
    assert killed and names(out) == ["owt-data.json", "train", "val"]
    assert names(out / "train") == names(out / "val") == ["1", "2", "3"]


def test_every_refusable_operation_is_in_one_module():
    """So that none is forgotten: the others call this module."""
    calls = (
        *("os.replace(", "os.rename(", "os.fsync(", "os.link(", "flock(", "os.utime(", "shutil.move("),
        *("statvfs(", "shutil.copy", "TemporaryDirectory(", "mkdtemp(", ".chmod(", "disk_usage("),
    )
    package = Path(filesystem.__file__).parent
    found = {
        f"{path.relative_to(package)}: {call}"
        for path in package.rglob("*.py")
        for call in calls
        if call in path.read_text(encoding="utf-8") and path.name != "filesystem.py"
    }
    assert not found
