"""The records of a run, read from the end: long files, damaged lines, steps that were taken back."""

import json
import os

import pytest

from horovod_owt.errors import ConfigError
from horovod_owt.runs import records
from horovod_owt.runs.records import (
    MetricsLog,
    append_record,
    last_step,
    newest_records,
    records_size,
    validations,
)


def line(kind: str, **values) -> str:
    return json.dumps({"kind": kind, **values}) + "\n"


@pytest.fixture
def metrics(tmp_path):
    return tmp_path / "metrics.jsonl"


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 16])
@pytest.mark.parametrize("count", [0, 1, 50])
def test_records_come_from_the_end_whatever_the_blocks(metrics, monkeypatch, block, count):
    monkeypatch.setattr(records, "BLOCK_BYTES", block)
    written = [{"kind": "step", "step": n, "note": "x" * (n % 13)} for n in range(count)]
    metrics.write_text("".join(json.dumps(record) + "\n" for record in written) + '{"kind": "st')
    assert list(newest_records(metrics)) == written[::-1]
    assert records_size(metrics.parent) == metrics.stat().st_size - len('{"kind": "st')


def test_the_last_step_is_found_without_reading_what_is_before(metrics, monkeypatch):
    """A file of 100 GB, were it not sparse."""
    with metrics.open("wb") as file:
        file.truncate(100 << 30)
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + line("step", step=9, images_per_s=2.0).encode())
        file.write(line("fault", fault="x").encode() * 5000)  # several blocks behind it
    assert last_step(metrics.parent) == (9, 2.0)
    MetricsLog(metrics.parent).close()


def test_a_line_longer_than_a_block_is_one_line(metrics, monkeypatch):
    monkeypatch.setattr(records, "BLOCK_BYTES", 16)
    metrics.write_text(line("step", step=1) + line("fault", fault="y" * 100))
    assert last_step(metrics.parent) == (1, None)


@pytest.mark.parametrize("damage", [b'{"kind": "step", "st\n', b"[1]\n", b"\xff\xfe\n", b"\0\0{}\n"])
def test_a_damaged_line_is_named_and_passed_over(metrics, caplog, damage):
    metrics.write_bytes(line("step", step=3, images_per_s=5.0).encode() + damage)
    assert last_step(metrics.parent) == (3, 5.0)
    assert f"{metrics}: damaged line skipped" in caplog.text and len(caplog.records) == 1


def test_lines_that_hold_nothing_are_no_damage(metrics, caplog):
    metrics.write_bytes(b"\0\0\n" + line("step", step=3).encode() + b"\0\0\0\0\n\n")
    assert len(list(newest_records(metrics))) == 1 and not caplog.records


def test_zeros_behind_the_last_line_are_cut_off_by_the_next_writer(metrics):
    metrics.write_bytes(line("step", step=3).encode() + b"\0" * 70_000)
    log = MetricsLog(metrics.parent)
    log.write("step", step=4)
    log.close()
    append_record(metrics, {"kind": "step", "step": 5})
    assert [record["step"] for record in newest_records(metrics)] == [5, 4, 3]


def test_records_that_cannot_be_read_are_an_error_and_none_are_none(metrics):
    assert list(newest_records(metrics)) == []
    metrics.mkdir()
    with pytest.raises(ConfigError, match="metrics.jsonl: Is a directory"):
        last_step(metrics.parent)


def test_what_another_attempt_wrote_is_not_looked_at(metrics):
    metrics.write_text(line("step", step=8))
    before = records_size(metrics.parent)
    assert last_step(metrics.parent, start=before) == (None, None)
    append_record(metrics, {"kind": "step", "step": 5})  # it resumed from step 4
    assert last_step(metrics.parent, start=before) == (5, None)


def test_a_validation_of_a_step_that_was_taken_back_does_not_count(metrics):
    def run(step):
        return line("run", first_step=step)

    def score(step, top1):
        return line("validation", step=step, top1=top1)

    def scores(*steps):
        return {step: record["top1"] for step, record in validations(metrics.parent, set(steps)).items()}

    assert scores(2) == {}
    metrics.write_text(run(0) + score(2, 20) + score(6, 60) + run(6))
    assert scores(2, 6, 7) == {2: 20, 6: 60}
    append_record(metrics, {"kind": "run", "first_step": 4})
    assert scores(2, 6) == {2: 20}
    with metrics.open("a") as file:
        file.write(score(6, 66) + run(6))
    assert scores(2, 6) == {2: 20, 6: 66}
