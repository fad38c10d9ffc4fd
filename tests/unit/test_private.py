"""Files where other users can write, with another user's files of the same name there first."""

import ctypes
import os
import signal
import stat
import tempfile
from pathlib import Path

import numpy as np
import pytest

from horovod_owt.data import listing
from horovod_owt.data.arrays import read_arrays, write_arrays
from horovod_owt.filesystem import locked
from horovod_owt.private import open_trusted, private_folder

STRANGER = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can play another user")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def shared(tmp_path):
    """A folder like /tmp, in which another user can put files."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    for parent in (tmp_path, *tmp_path.parents):
        if Path(tempfile.gettempdir()) in parent.parents:
            parent.chmod(parent.stat().st_mode | 0o111)
    return folder


def as_stranger(act) -> None:
    """Do it in a child that is another user; the child ends with this process."""
    child = os.fork()
    if child == 0:
        try:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
            os.setgroups([])
            os.setgid(STRANGER)
            os.setuid(STRANGER)
            act()
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_private_folder_is_for_its_user_alone_whatever_the_umask(tmp_path):
    old = os.umask(0)
    try:
        assert mode(private_folder(tmp_path / "a" / "b")) == 0o700
    finally:
        os.umask(old)
    (tmp_path / "a" / "b").chmod(0o775)
    assert mode(private_folder(tmp_path / "a" / "b")) == 0o755
    (tmp_path / "link").symlink_to(tmp_path / "a")  # one's own: a cache on another disk
    private_folder(tmp_path / "link")


@needs_root
@pytest.mark.parametrize("what", ["folder", "link to theirs", "link to mine"])
def test_another_users_folder_is_not_used(shared, tmp_path, what):
    mine = tmp_path / "mine"
    mine.mkdir()

    def plant():
        (shared / "theirs").mkdir(mode=0o777)
        if what != "folder":
            (shared / "cache").symlink_to(shared / "theirs" if what == "link to theirs" else mine)

    as_stranger(plant)
    with pytest.raises(PermissionError, match="belongs to another user"):
        private_folder(shared / ("theirs" if what == "folder" else "cache"))


def test_a_lock_empties_no_file_and_follows_no_link(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    with locked(precious):
        assert precious.read_text() == "kept"
    (tmp_path / "lock").symlink_to(precious)
    with pytest.raises(OSError), locked(tmp_path / "lock"):
        pass
    (tmp_path / "dangling").symlink_to(tmp_path / "created")
    with pytest.raises(OSError), locked(tmp_path / "dangling"):
        pass
    assert not (tmp_path / "created").exists() and precious.read_text() == "kept"


def test_a_fifo_in_place_of_a_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(PermissionError):
        open_trusted(tmp_path / "fifo", {os.geteuid()})


def test_a_file_is_trusted_by_its_owner_and_never_through_a_link(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"x")
    with open_trusted(file, {os.geteuid()}) as found:
        assert found.read() == b"x"
    with pytest.raises(PermissionError, match=f"a file of user {os.geteuid()}"):
        open_trusted(file, {os.geteuid() + 1})
    (tmp_path / "link").symlink_to(file)
    with pytest.raises(OSError):
        open_trusted(tmp_path / "link", {os.geteuid()})


@pytest.fixture
def split(shared, monkeypatch):
    """A split in a folder that all can write to, large enough for a cache, and the user's cache folder."""
    monkeypatch.setattr(listing, "CACHE_FROM", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared / "cache"))
    folder = shared / "train"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        (folder / name / "1.JPEG").write_bytes(b"x")
        os.utime(folder / name, (1, 1))
    return folder


def names(split: Path) -> list[bytes]:
    return list(listing.list_split(split).names)


@needs_root
def test_another_users_listing_next_to_the_data_is_not_read(split):
    names(split)
    beside = listing.cache_files(split)[0]
    arrays = read_arrays(beside)
    beside.unlink()
    spoiled = arrays | {"image_bytes": np.frombuffer(b"2.JPEG2.JPEG", np.uint8)}
    as_stranger(lambda: write_arrays(beside, spoiled))
    assert beside.stat().st_uid == STRANGER and listing._read_cached(split) is None
    write_arrays(beside, spoiled)  # the same from this user is believed: the test would see it
    assert list(listing._read_cached(split).names) == [b"2.JPEG", b"2.JPEG"]


@needs_root
def test_another_users_link_or_folder_for_the_cache_is_survived(split, shared, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    beside, below = listing.cache_files(split)

    def plant():
        beside.symlink_to(precious)
        below.parent.mkdir(parents=True)
        below.symlink_to(precious)

    as_stranger(plant)
    assert len(names(split)) == 2 and precious.read_text() == "kept"
    assert not beside.is_symlink()  # replaced, as its folder is ours


def test_the_users_own_cache_is_for_the_user_alone(split, monkeypatch):
    monkeypatch.setattr(listing, "cache_files", lambda folder: [Path("/proc/x/y"), real(folder)[1]])
    names(split)
    below = real(split)[1]
    assert below.exists()
    assert mode(below.parent) == mode(below.parent.parent) == 0o700


real = listing.cache_files
