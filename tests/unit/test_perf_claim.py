"""A claim in two readings, against sums by hand; the document about it is what its script writes."""

import importlib
import math
from pathlib import Path

import pytest

from horovod_owt.errors import ConfigError
from horovod_owt.perf.claim import Claim, check_claim, format_claim, parse_claim
from horovod_owt.perf.machine import load_machine

DOCS = Path(__file__).parents[2] / "docs"
BOSTON = load_machine("boston-k80")


def readings(text: str, error: float | None = None, machine=BOSTON):
    checked = check_claim(parse_claim(text, error=error, machine=machine), machine)
    return {reading["reading"]: reading for reading in checked["readings"]}, checked


def test_boston_as_written_is_out_of_reach():
    written = readings("1000 epochs in 32 minutes", 6.9)[0]["written"]
    assert not written["fits"]
    assert written["s_per_epoch"] == 1.7
    assert written["images_per_s"] == pytest.approx(1_281_167 / 1.7)  # 753,628
    assert written["floor_s"] == pytest.approx(1_281_167 * 4_144_577_280 / 17.48e12)  # 303.8 s
    assert written["factor"] == pytest.approx(178.7, abs=0.1)


def test_boston_as_printed_fits():
    found, checked = readings("1000 epochs in 32 minutes", 6.9)
    printed = found["printed"]
    assert printed["fits"] and printed["s_per_batch"] == 1.7
    assert printed["images_per_s"] == pytest.approx(75.3, abs=0.05)
    assert printed["floor_s"] == pytest.approx(128 * 4_144_577_280 / 17.48e12)  # 0.030 s
    assert "all of them fit" in checked["verdict"]
    text = format_claim(checked)
    assert "= 753,628 images/s" in text and "ln(1000) = 6.9078" in text and "= 0.22 s" in text


def test_a_loss_that_is_not_that_of_an_untrained_net_does_not_fit():
    found, checked = readings("1000 epochs in 32 minutes", 5.0)
    assert not found["printed"]["fits"] and checked["verdict"].startswith("Neither")
    assert found["printed"]["factor"] < 1


def test_a_claim_that_is_possible_is_called_possible():
    found, checked = readings("90 epochs in 12 hours", 20.9)
    assert found["written"]["fits"] and checked["verdict"] == "As written it is possible."
    assert found["written"]["s_per_epoch"] == pytest.approx(480)


def test_a_possible_claim_is_not_a_number_of_times_out_of_reach():
    text = format_claim(readings("90 epochs in 12 hours", 42.5)[1])
    assert "images/s, no fewer\n" in text and "at least, 0.63 times 480 s" in text
    assert "42.5 % is 2.1 times that of top-5, 1.0 times that of top-1" in text
    found, checked = readings("1000 epochs in 20 days", 6.9)
    assert found["written"]["factor"] < 1 and not found["written"]["fits"]
    assert checked["verdict"].startswith("As written the speed is possible, but not an error of 6.9 %; read")


def test_a_claim_of_mini_batches_is_not_read_as_epochs():
    found, checked = readings("1000 mini-batches in 32 minutes", 6.9)
    assert list(found) == ["printed"] and checked["verdict"] == "As written it is possible."
    assert readings("1000 batches in 10 seconds")[1]["verdict"] == "It does not fit this machine."


def test_the_time_of_one_is_the_quotient_where_the_report_is_not_this_one():
    assert readings("100 epochs in 32 minutes")[0]["written"]["s_per_epoch"] == pytest.approx(19.2)
    other = load_machine("dgx-1-p100")
    assert parse_claim("1000 epochs in 32 minutes", error=None, machine=other).per_unit_s == 1.92


@pytest.mark.parametrize(
    ("text", "error", "told"),
    [
        ("fast", None, "wanted COUNT epochs in NUMBER minutes"),
        ("1000 epocs in 32 minutes", None, "fix: use epochs"),
        ("1000 epochs in 32 minuts", None, "fix: use minutes"),
        ("0 epochs in 32 minutes", None, "wanted numbers above 0"),
        ("10 epochs in 0 s", None, "'s'"),
        ("1000 epochs in 32 minutes", -1.0, "--error -1"),
        ("1000 epochs in 32 minutes", math.nan, "--error nan"),
    ],
)
def test_claims_that_say_nothing_are_refused_in_one_line(text, error, told):
    with pytest.raises(ConfigError) as caught:
        parse_claim(text, error=error, machine=BOSTON)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_units_may_be_other():
    for text in ("10 mini-batches in 20 seconds", "10 batches in 20 seconds", "10 steps in 20 seconds"):
        assert parse_claim(text, error=None, machine=BOSTON) == Claim(10, 20, unit="mini-batch")


def test_the_document_is_what_its_script_writes(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    written = importlib.import_module("write_boston_report").document()
    assert (DOCS / "boston-report.md").read_text(encoding="utf-8") == written
    assert max(map(len, written.splitlines())) <= 118
