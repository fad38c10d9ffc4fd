"""Timelines whose writer was killed become whole JSON."""

import json

import pytest

from horovod_owt.runs.timeline import complete_timeline, complete_timelines

# As Horovod writes: two lines of metadata for the file, and two for each tensor, before its first event.
META = (
    '{"name": "process_name", "ph": "M", "pid": %d, "args": {"name": "conv gradients.%d"}},\n'
    '{"name": "process_sort_index", "ph": "M", "pid": %d, "args": {"sort_index": %d}},\n'
)
EVENT = '{"ph": "B", "name": "NEGOTIATE_ALLREDUCE", "ts": %d, "pid": %d, "args": {"rank": 0}}'


def a_timeline(tensors: int = 2) -> str:
    """As Horovod leaves it: the array is closed after each event, and the bracket replaced by a comma."""
    parts = [META % (0, 0, 0, 0)]
    for tensor in range(1, tensors + 1):
        before = "," if tensor > 1 else ""
        parts.append(before + META % (tensor, tensor, tensor, tensor) + EVENT % (tensor * 100, tensor))
    return "[\n" + "".join(parts) + "]"


def test_a_kill_after_any_byte_leaves_an_array_of_whole_events(tmp_path):
    whole = a_timeline()
    events = json.loads(whole)
    file = tmp_path / "step-00000000.json"
    lengths = set()
    for end in range(len(whole) + 1):
        for text in {whole[:end], whole[:end] + "]" if whole[:end].endswith("}") else whole[:end]}:
            file.write_text(text)
            complete_timeline(file)
            found = json.loads(file.read_text())
            assert found == events[: len(found)], text
            lengths.add(len(found))
    assert lengths == set(range(len(events) + 1))


def test_a_whole_one_is_not_touched(tmp_path):
    file = tmp_path / "step-00000000.json"
    file.write_text(a_timeline() + "\n")
    before = file.stat().st_mtime_ns, file.read_text()
    complete_timeline(file)
    assert (file.stat().st_mtime_ns, file.read_text()) == before


def test_of_a_large_one_only_the_end_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("horovod_owt.runs.timeline.TAIL_BYTES", 400)
    file = tmp_path / "step-00000000.json"
    whole = a_timeline(tensors=200)
    file.write_text(whole[:-30])
    complete_timeline(file)
    assert json.loads(file.read_text()) == json.loads(whole)[:-1]


def test_those_of_a_run_folder(tmp_path):
    assert complete_timelines(tmp_path) == []
    folder = tmp_path / "timeline"
    folder.mkdir()
    files = [folder / name for name in ("step-00000000.json", "step-00000040.json", "notes.txt")]
    for file in files:
        file.write_text("")
    assert complete_timelines(tmp_path) == files[:2]
    assert [file.read_text() for file in files] == ["[]", "[]", ""]


@pytest.mark.parametrize("text", ["not JSON at all", '{"a": 1}'])
def test_something_else_does_not_end_a_run(tmp_path, text):
    file = tmp_path / "step-00000000.json"
    file.write_text(text)
    complete_timeline(file)
