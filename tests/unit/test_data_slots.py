"""The file of a cache: what one process puts another one gets, or nothing, whatever happens to the first."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horovod_owt.data.slots import BLOCK, REGION, Slots

pytestmark = pytest.mark.timeout(60)

COUNT = 20
NUMBERS = (3, 4, 5, 6)


def always(size: int) -> bool:
    return True


def data_of(number: int) -> memoryview:
    length = 1 + 997 * number
    return memoryview(np.random.default_rng(number).integers(0, 256, length, np.uint8).tobytes())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "slots"


def filled(path) -> Slots:
    slots = Slots(path, COUNT, always)
    for number in range(COUNT):
        assert slots.put(number, number + 7, data_of(number), NUMBERS)
    return slots


@pytest.mark.parametrize("mapped", [False, True])
def test_what_one_process_puts_every_process_gets(path, mapped):
    mine, other = Slots(path, COUNT, always, mapped=mapped), Slots(path, COUNT, always)
    assert mine.get(0, 7) is None
    for number in range(COUNT):
        (mine if number % 2 else other).put(number, number + 7, data_of(number), NUMBERS)
    for reader in (mine, other, Slots(path, COUNT, always)):
        for number in range(COUNT):
            data, numbers = reader.get(number, number + 7)
            assert data == data_of(number) and numbers == NUMBERS
            assert reader.get(number, number) is None  # of a file that has changed
    mine.put(3, 99, data_of(5), NUMBERS)
    assert other.get(3, 10) is None and other.get(3, 99).data == data_of(5)


def test_an_entry_larger_than_a_region_is_stored(path):
    large = memoryview(bytes(REGION + 1))
    slots = Slots(path, 1, always)
    assert slots.put(0, 1, large, NUMBERS) and slots.get(0, 1).data == large


KILLED = """
import os, sys, time
import numpy as np
from pathlib import Path
from horovod_owt.data import slots as module
from horovod_owt.data.slots import Slots

path, when, share = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
write, extend, calls = module._write, module.extend, 0

def hang():
    print("ready", flush=True)
    time.sleep(1000)

def cut_short(descriptor, data, place):
    global calls
    calls += 1
    if calls == {"header": 1, "entry": 4, "slot": 5}[when]:
        write(descriptor, data[: int(len(data) * share)], place)
        hang()
    write(descriptor, data, place)

def extended(descriptor, size):
    if when == "growing" and size > 10**6:
        extend(descriptor, 1234567)
        hang()
    return extend(descriptor, size)

module._write, module.extend = (extended and cut_short if when != "growing" else write), extended
slots = Slots(path, 20, lambda size: True)
slots.put(1, 8, memoryview(bytes(range(200))), (3, 4, 5, 6))
slots.put(2, 9, memoryview(bytes(range(200)) * 50), (3, 4, 5, 6))
"""


@pytest.mark.parametrize(
    ("when", "share"),
    [("header", 0.5), ("growing", 0), ("entry", 0), ("entry", 0.5), ("entry", 1), ("slot", 0)],
)
def test_a_process_that_is_killed_while_it_writes_leaves_nothing_torn(path, when, share):
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path), when, str(share)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "ready\n"
    if when in ("entry", "slot"):  # and meanwhile others are not kept waiting
        beside = Slots(path, COUNT, always)
        assert beside.put(5, 1, data_of(5), NUMBERS) and beside.get(1, 8) and beside.get(2, 9) is None
    child.kill()
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()
    slots = Slots(path, COUNT, always)
    assert (slots.get(1, 8) is not None) == (when in ("entry", "slot"))
    assert slots.get(2, 9) is None
    for number in range(COUNT):
        assert slots.put(number, 7, data_of(number), NUMBERS)
    assert all(slots.get(number, 7).data == data_of(number) for number in range(COUNT))


@settings(max_examples=60)
@given(st.data())
def test_a_damaged_file_has_fewer_entries_but_no_wrong_ones(tmp_path_factory, data):
    """As a power cut leaves it: blocks that were never written, or the end of the file missing."""
    path, mapped = tmp_path_factory.mktemp("slots") / "slots", data.draw(st.booleans())
    filled(path)
    size = REGION // 8  # where the entries are
    with open(path, "r+b") as file:
        for block in data.draw(st.lists(st.integers(1, size // BLOCK), max_size=20)):
            file.seek(block * BLOCK)
            file.write(data.draw(st.sampled_from([bytes(BLOCK), b"\xff" * BLOCK, os.urandom(BLOCK)])))
        if data.draw(st.booleans()):
            file.truncate(data.draw(st.integers(0, size)))
    slots = Slots(path, COUNT, always, mapped=mapped)
    for number in range(COUNT):
        entry = slots.get(number, number + 7)
        assert entry is None or entry == (data_of(number), NUMBERS)
        assert slots.put(number, number + 7, data_of(number), NUMBERS)
        assert slots.get(number, number + 7).data == data_of(number)


def test_it_stops_growing_when_told(path):
    left = [2 * REGION]

    def may_grow(size):
        left[0] -= size
        return left[0] >= 0

    slots, large = Slots(path, COUNT, may_grow), memoryview(bytes(REGION // 4))
    stored = [slots.put(number, 1, large, NUMBERS) for number in range(COUNT)]
    assert sum(stored) == 6 and all(stored[:6]) and slots.full
    assert path.stat().st_size < 3 * REGION
    assert slots.get(0, 1) and slots.get(10, 1) is None


@pytest.mark.parametrize("where", ["posix_fallocate", "pwrite"])
def test_on_a_full_disk_nothing_is_stored_and_nothing_raised(path, where, monkeypatch):
    slots = filled(path)
    before = path.stat().st_size

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, where, full)
    assert not slots.put(0, 5, memoryview(bytes(2 * REGION)), NUMBERS) and slots.full
    assert where == "pwrite" or path.stat().st_size == before
    assert slots.get(0, 7).data == data_of(0)


def test_a_file_system_without_locks_is_not_written_to(path, monkeypatch):
    slots = Slots(path, COUNT, always)

    def refused(*args):
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr(fcntl, "flock", refused)
    assert not slots.put(0, 1, data_of(0), NUMBERS)


SHARED = """
import sys
from pathlib import Path
import numpy as np
from horovod_owt.data.slots import Slots

rank = int(sys.argv[2])
slots = Slots(Path(sys.argv[1]), 200, lambda size: True, mapped=rank > 0)
rng = np.random.default_rng(rank)
for number in rng.permutation(200).tolist() * 3:
    data = np.random.default_rng(number).bytes(50_000)
    entry = slots.get(number, 1)
    assert entry is None or entry.data == data, number
    if entry is None or rng.random() < 0.2:
        assert slots.put(number, 1, memoryview(data), (number, 0, 0, 0))
"""


def test_processes_that_write_the_same_slots_at_once_do_no_harm(path):
    ranks = [subprocess.Popen([sys.executable, "-c", SHARED, str(path), str(rank)]) for rank in range(3)]
    assert [rank.wait() for rank in ranks] == [0] * 3
    slots = Slots(path, 200, always)
    assert all(slots.get(number, 1).numbers[0] == number for number in range(200))


def test_a_file_that_is_shorter_than_its_slots_is_made_anew(path):
    """As a kill leaves it that comes after the header."""
    filled(path)
    os.truncate(path, BLOCK + 8)
    slots = filled(path)
    assert all(slots.get(number, number + 7).data == data_of(number) for number in range(COUNT))


def test_a_link_is_not_followed(path, tmp_path):
    (tmp_path / "theirs").write_text("content")
    path.symlink_to(tmp_path / "theirs")
    with pytest.raises(OSError):
        Slots(path, COUNT, always)
    assert (tmp_path / "theirs").read_text() == "content"
