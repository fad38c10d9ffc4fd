"""The records of a run, read from the end: long files, damaged lines, steps that were taken back."""

import json
import os
import time
from types import SimpleNamespace

import pytest

from horovod_owt.errors import ConfigError
from horovod_owt.logs import utc
from horovod_owt.runs import records
from horovod_owt.runs.records import (
    MetricsLog,
    Start,
    append_record,
    last_attempt,
    last_step,
    newest_records,
    records_size,
    time_of,
    validations,
)


def line(kind: str, **values) -> str:
    return json.dumps({"kind": kind, **values}) + "\n"


@pytest.fixture
def metrics(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_what_json_lacks_is_null(tmp_path):
    """As the norm of gradients that overflowed in fp16, which the loss scaler handles."""
    log = MetricsLog(tmp_path)
    told = log.write("step", step=1, grad_norm=float("inf"), of=(float("nan"), 2.5))
    log.close()
    assert told["grad_norm"] == float("inf")
    written = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(written, parse_constant=pytest.fail)
    assert record["grad_norm"] is None and record["of"] == [None, 2.5]


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


def test_a_validation_that_is_missing_is_not_looked_for_in_the_whole_file(metrics, monkeypatch):
    steps = [line("step", step=number) for number in range(1, 1001)]
    metrics.write_text(line("run", first_step=0) + "".join(steps))
    read, newest = [], records.newest_records
    monkeypatch.setattr(
        records, "newest_records", lambda file: (read.append(1) or record for record in newest(file))
    )
    assert validations(metrics.parent, {995}) == {} and len(read) <= 7
    metrics.write_text(
        line("run", first_step=0) + "".join(steps[:995]) + line("validation", step=995, top1=7)
    )
    append_record(metrics, {"kind": "step", "step": 996})
    assert validations(metrics.parent, {995}).keys() == {995}


def test_each_line_has_the_time_the_attempt_and_the_job(metrics):
    log, before = MetricsLog(metrics.parent, Start(3, "7_2")), time.time()
    log.write("step", step=9)
    log.close()
    (record,) = newest_records(metrics)
    assert list(record) == ["kind", "time", "attempt", "job_id", "step"]
    assert (record["attempt"], record["job_id"]) == (3, "7_2")
    assert before - 0.001 <= time_of(record) <= time.time() and record["time"].endswith("Z")


@pytest.mark.parametrize("tz", ["UTC", "Asia/Kolkata", "America/New_York"])
def test_times_are_utc_whatever_the_clock_shows(monkeypatch, tz):
    monkeypatch.setenv("TZ", tz)
    time.tzset()
    try:
        assert utc(1_800_000_000.25) == "2027-01-15T08:00:00.250Z"
        assert time_of({"time": "2027-01-15T08:00:00.250Z"}) == 1_800_000_000.25
        assert time_of({"time": utc()}) == pytest.approx(time.time(), abs=1)
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("record", [{}, {"time": None}, {"time": 7}, {"time": "yesterday"}])
def test_a_record_without_a_usable_time_has_none(record):
    assert time_of(record) is None


def test_the_last_attempt_is_that_of_the_newest_record_with_a_number(metrics):
    assert last_attempt(metrics) == 0
    metrics.write_text(line("step", step=1))  # of an older version
    assert last_attempt(metrics) == 0
    metrics.write_text(
        line("step", attempt=2) + line("step", attempt=3) + line("fault") + line("x", attempt="4")
    )
    assert last_attempt(metrics) == 3


def test_a_write_of_part_of_a_line_is_continued(tmp_path):
    """As a nearly full disk and some network file systems do."""
    log = MetricsLog(tmp_path)
    file, log._file = log._file, SimpleNamespace(write=lambda data: file.write(data[:7]))
    log.write("step", step=1)
    file.close()
    assert [record["step"] for record in newest_records(tmp_path / "metrics.jsonl")] == [1]
