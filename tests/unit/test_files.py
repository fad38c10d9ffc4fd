"""Files and folders appear whole or not at all."""

import os

import pytest

from horovod_owt.errors import ConfigError
from horovod_owt.files import atomic_file, atomic_folder, output_file, write_text
from horovod_owt.filesystem import PARTIAL


class Stopped(BaseException):
    """Like Ctrl-C, no Exception."""


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_whole_or_left_as_it_was(tmp_path, durable):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(Stopped), atomic_file(path, durable=durable) as file:
        file.write(b"half")
        raise Stopped
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    with atomic_file(path, durable=durable) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


def test_a_file_that_the_user_named_and_that_cannot_be_written_is_told_with_its_option(tmp_path):
    file = tmp_path / "folder"
    (file / "content").mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"--out {file}: Is a directory"), output_file(file, "--out") as out:
        out.write(b"text")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with output_file(pipe, "--output") as out:
        out.write(b"page")
    assert os.read(reader, 9) == b"page" and pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]
    os.close(reader)


@pytest.mark.parametrize("old", [True, False])
def test_a_link_stays_a_link(tmp_path, old):
    (tmp_path / "other").mkdir()
    target, link = tmp_path / "other" / "page", tmp_path / "link"
    link.symlink_to(target)
    if old:
        target.write_text("old")
    with output_file(link, "--output") as out:
        out.write(b"new")
    assert link.is_symlink() and target.read_text() == "new" and os.listdir(target.parent) == ["page"]


def test_a_file_may_be_written_in_another_folder(tmp_path):
    (tmp_path / "scratch").mkdir()
    with atomic_file(tmp_path / "file", folder=tmp_path / "scratch"):
        assert len(list((tmp_path / "scratch").glob(PARTIAL))) == 1 and not list(tmp_path.glob(PARTIAL))
    assert sorted(os.listdir(tmp_path)) == ["file", "scratch"]


@pytest.mark.parametrize("durable", [False, True])
def test_a_folder_is_replaced_whole(tmp_path, durable):
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "final", durable=durable, replace=True) as scratch:
            (scratch / "sub").mkdir()
            (scratch / "sub" / text).write_text(text)
            assert (tmp_path / "final").exists() == (text == "new")
    assert os.listdir(tmp_path / "final" / "sub") == ["new"] and os.listdir(tmp_path) == ["final"]


def test_a_folder_that_holds_something_is_replaced_only_if_that_is_asked_for(tmp_path):
    (tmp_path / "final").mkdir()
    with atomic_folder(tmp_path / "final") as scratch:  # an empty one is nobody's
        (scratch / "mine").touch()
    with pytest.raises(OSError), atomic_folder(tmp_path / "final") as scratch:
        (scratch / "theirs").touch()
    assert os.listdir(tmp_path / "final") == ["mine"] and os.listdir(tmp_path) == ["final"]


def test_what_is_durable_is_synced_before_it_takes_its_name(tmp_path, monkeypatch):
    told, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: told.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda *names: told.append("rename") or replace(*names))
    with atomic_folder(tmp_path / "final", durable=True) as scratch:
        (scratch / "weights").write_text("1")
    assert told == [str(scratch / "weights"), str(scratch), "rename", str(tmp_path)]
    told.clear()
    write_text(tmp_path / "note", "2")
    written, *rest = told
    assert written.endswith(".partial") and rest == ["rename", str(tmp_path)]
