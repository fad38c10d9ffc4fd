"""What a person sees of a run under way: lines in a log, or a bar on a terminal."""

import io
import logging
import re

import pytest

from horovod_owt.train.progress import Progress
from horovod_owt.train.replica import StepReport

GLOBAL_BATCH = 8


def report(loss: float, step_s: float = 0.5, data_wait_s: float = 0.05, exposed_comm_s: float = 0.1):
    return StepReport(
        loss=loss,
        stop_asked=False,
        step_s=step_s,
        data_wait_s=data_wait_s,
        exposed_comm_s=exposed_comm_s,
    )


def progress(*, total_steps=5, first_step=0, every=2) -> Progress:
    return Progress(
        total_steps=total_steps,
        first_step=first_step,
        global_batch=GLOBAL_BATCH,
        every=every,
    )


@pytest.fixture
def lines(caplog):
    """The lines that were logged, as they read."""
    caplog.set_level(logging.INFO, logger="horovod_owt")
    return lambda: [record.getMessage() for record in caplog.records]


def test_each_nth_step_has_a_line_with_the_mean_of_the_steps_since_the_one_before(lines):
    with progress(total_steps=6) as shown:
        shown.step(1, 0.1, 0.01, report(4.0, step_s=0.3, data_wait_s=0.1, exposed_comm_s=0.0))
        assert lines() == []
        shown.step(2, 0.2, 0.02, report(2.0, step_s=0.5, data_wait_s=0.1, exposed_comm_s=0.2))
        shown.step(3, 0.3, 0.02, report(1.0))
        shown.step(4, 0.4, 0.002, report(0.5))
    assert lines() == [
        "step 2/6 | epoch 0.20 | loss 3.000 | lr 2.0e-02 | 20 img/s | step 400.0 ms (data 25 %, comm 25 %)",
        "step 4/6 | epoch 0.40 | loss 0.750 | lr 2.0e-03 | 16 img/s | step 500.0 ms (data 10 %, comm 20 %)",
    ]


def test_the_last_step_has_a_line_whatever_its_number(lines):
    with progress(total_steps=5, first_step=2, every=10) as shown:
        for step in (3, 4, 5):
            shown.step(step, step / 5, 0.01, report(float(step)))
    (line,) = lines()
    assert line.startswith("step 5/5 | epoch 1.00 | loss 4.000 |")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_bar_takes_the_place_of_the_lines(monkeypatch, lines):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with progress(total_steps=5, first_step=1, every=2) as shown:
        shown.step(2, 0.4, 0.01, report(1.5))
        shown.step(3, 0.6, 0.01, report(9.0))  # the bar moves, its words wait for the 4th
    assert lines() == []
    last = re.split(r"[\r\n]", terminal.getvalue().rstrip())[-1]
    assert " 3/5 " in last and "loss 1.500, 16 img/s, data 10%, comm 20%" in last


def test_beside_a_bar_log_lines_go_through_it_and_afterwards_where_they_went(monkeypatch):
    log, terminal = logging.getLogger("horovod_owt"), Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    before = logging.StreamHandler(terminal)
    monkeypatch.setattr(log, "handlers", [before])
    shown = progress()
    with shown:
        log.warning("above the bar")
        assert log.handlers != [before]
    assert "above the bar\n" in terminal.getvalue()
    assert log.handlers == [before]
