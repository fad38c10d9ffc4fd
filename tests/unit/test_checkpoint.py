"""Checkpoints: whole or absent, and the newest sound one wins."""

import shutil

import pytest
import torch

from horovod_owt.errors import RunError
from horovod_owt.train import checkpoint as module
from horovod_owt.train.checkpoint import (
    FILES,
    MANIFEST,
    Checkpoint,
    CheckpointWriter,
    atomic_folder,
    find_fault,
    list_checkpoints,
    newest_sound,
    read_checkpoint,
    write_checkpoint,
)


def checkpoint(step: int) -> Checkpoint:
    values = torch.arange(6.0).view(2, 3) + step
    return Checkpoint({"w": values}, {"momentum.w": -values}, {"step": step, "samples_consumed": 32 * step})


def test_what_was_written_is_read(tmp_path):
    folder = write_checkpoint(tmp_path, checkpoint(7), keep=3)
    assert folder == tmp_path / "checkpoints" / "step-00000007"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, MANIFEST])
    back = read_checkpoint(folder)
    assert torch.equal(back.model["w"], checkpoint(7).model["w"])
    assert torch.equal(back.optimizer["momentum.w"], checkpoint(7).optimizer["momentum.w"])
    assert back.state == checkpoint(7).state


def test_the_newest_few_are_kept(tmp_path):
    for step in (9, 10, 11, 100):
        write_checkpoint(tmp_path, checkpoint(step), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000100", "step-00000011"]


def flip_a_byte(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)


DAMAGE = {
    "flipped": lambda folder, name: flip_a_byte(folder, name),
    "cut": lambda folder, name: (folder / name).write_bytes((folder / name).read_bytes()[:-5]),
    "gone": lambda folder, name: (folder / name).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, caplog, name, damage):
    older = write_checkpoint(tmp_path, checkpoint(1), keep=3)
    newer = write_checkpoint(tmp_path, checkpoint(2), keep=3)
    DAMAGE[damage](newer, name)
    assert newest_sound(tmp_path) == older
    assert str(newer) in caplog.text
    with pytest.raises(RunError, match="step-00000002"):
        read_checkpoint(newer)


def test_no_checkpoint_is_no_error(tmp_path):
    assert newest_sound(tmp_path) is None


def test_a_write_that_fails_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, checkpoint(1), keep=3)

    def full_disk(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full_disk)
    with pytest.raises(RunError, match="No space left on device"):
        write_checkpoint(tmp_path, checkpoint(2), keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert find_fault(tmp_path / "checkpoints" / "step-00000001") == ""


def test_the_remains_of_a_killed_write_are_no_checkpoint_and_in_nobodys_way(tmp_path):
    folder = write_checkpoint(tmp_path, checkpoint(1), keep=3)
    shutil.copytree(folder, folder.with_name(".step-00000002.partial"))
    assert list_checkpoints(tmp_path) == [folder]
    write_checkpoint(tmp_path, checkpoint(2), keep=3)
    assert not folder.with_name(".step-00000002.partial").exists()


def test_a_folder_is_replaced_whole(tmp_path):
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "final") as scratch:
            (scratch / text).write_text(text)
            assert (tmp_path / "final").exists() == (text == "new")
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["new"]


def test_the_writer_reports_a_failed_write_to_the_training_thread(tmp_path):
    writer = CheckpointWriter(tmp_path, keep=1)
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    writer.write(checkpoint(1))
    with pytest.raises(RunError, match="not written"):
        writer.wait()
    writer.close()
