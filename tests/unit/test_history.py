"""The history of a run is read whole: what was lost, what is damaged, what an older version wrote."""

import json
import math

import pytest
from written_runs import BEGAN, WrittenRun, eventful_run

from horovod_owt.runs.history import MAX_FAULTS, read_history


def write(folder, *records, tail=""):
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" + tail)
    return read_history(folder)


def step(number, **values):
    return {"kind": "step", "step": number, "loss": float(number), **values}


def run(first_step):
    return {"kind": "run", "first_step": first_step}


def test_every_number_of_every_step_is_there(tmp_path):
    written = WrittenRun(tmp_path)
    written.start(["a", "b"])
    written.steps(60, grad_norm=1.25)
    history = read_history(tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    for name in (
        "epoch",
        "loss",
        "lr",
        "images_per_s",
        "step_ms",
        "data_wait_ms",
        "exposed_comm_ms",
        "grad_norm",
    ):
        assert list(history.steps[name]) == [record[name] for record in steps]
    assert list(history.steps.step) == list(range(1, 61))
    assert history.lines == len(records) and history.damaged == 0
    assert history.began_at() == BEGAN and history.steps.time[0] > BEGAN + 12
    assert history.starts[0].sent_steps == 60
    assert history.starts[0].sent["fc gradients"] == 60 * steps[0]["bytes_sent"]["fc gradients"]


def test_steps_beyond_where_a_later_start_resumed_are_lost(tmp_path):
    rows = [run(0), *map(step, range(1, 8)), run(5), *map(step, range(6, 10)), run(3), step(4)]
    history = write(tmp_path, *rows)
    kept = [s for s, is_kept in zip(history.steps.step, history.steps.kept, strict=True) if is_kept]
    assert kept == [1, 2, 3, 4]
    assert [start.lost_before for start in history.starts] == [0, 2, 6]


def test_validations_of_lost_steps_do_not_count(tmp_path):
    validations = [{"kind": "validation", "step": n, "top1": n} for n in (2, 4)]
    history = write(
        tmp_path, run(0), step(1), step(2), validations[0], step(3), step(4), validations[1], run(2)
    )
    assert [event.record["step"] for event in history.validations] == [2]


def test_damaged_lines_are_counted_and_an_unfinished_one_is_not(tmp_path):
    bad = ["{broken", "[1]", '{"kind": 3}', '{"kind": "step"}', '{"kind": "step", "step": -1}', "\0\0\0"]
    bad += [json.dumps(step(10**30))]
    odd = {"kind": "step", "step": 2, "loss": "x", "lr": None, "bytes_sent": [1], "step_ms": 10**400}
    history = write(tmp_path, run(0), step(1), *bad, odd, tail='{"kind": "st')
    assert list(history.steps.step) == [1, 2] and math.isnan(history.steps["loss"][1])
    assert (
        history.damaged == len(bad) - 2 and history.first_damaged == "'{broken'"
    )  # neither zeros nor a kind


@pytest.mark.parametrize("nothing", ["", "\n", "\0" * 100])
def test_a_folder_without_records_is_empty(tmp_path, nothing):
    assert read_history(tmp_path).lines == 0
    (tmp_path / "metrics.jsonl").write_text(nothing)
    assert read_history(tmp_path).lines == 0


def test_old_records_have_no_time(tmp_path):
    history = write(tmp_path, run(0), step(1), {"kind": "outcome", "exit_code": 0})
    assert not history.has_times() and math.isnan(history.ended_at())


def test_faults_without_end_do_not_fill_the_memory(tmp_path):
    faults = [{"kind": "fault", "fault": "x"}] * (MAX_FAULTS + 5)
    history = write(tmp_path, run(0), *faults)
    assert len(history.of_kind("fault")) == MAX_FAULTS and history.more_faults == 5


def test_an_eventful_run_keeps_each_step_once(tmp_path):
    eventful_run(tmp_path)
    history = read_history(tmp_path)
    kept = [s for s, is_kept in zip(history.steps.step, history.steps.kept, strict=True) if is_kept]
    assert kept == list(range(1, 301)) and len(history.steps) == 320
