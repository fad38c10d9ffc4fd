"""docs/hybrid.md: its figures are those of perf."""

import re
from pathlib import Path

import pytest

from horovod_owt.config import TrainConfig
from horovod_owt.perf.network import FC6_IN, HIDDEN, fc_parameters
from horovod_owt.perf.traffic import break_even_batch, bytes_sent_per_step

DOCS = Path(__file__).parents[2] / "docs"


def megabytes(group_size: int, **values) -> str:
    cfg = TrainConfig(classes=1000, fc_group_size=group_size, **values)
    return f"{sum(bytes_sent_per_step(cfg, group_size).values()) / 1e6:.1f}"


@pytest.mark.parametrize("group_size", [2, 4, 8, 16])
@pytest.mark.parametrize(("precision", "pass_bytes"), [("fp32", 4), ("bf16", 2)])
def test_the_table_of_bytes_is_the_closed_form(group_size, precision, pass_bytes):
    cells = [
        group_size,
        megabytes(group_size, parallel="data", batch=32),
        *(megabytes(group_size, parallel="hybrid", precision=precision, batch=b) for b in (32, 128, 512)),
        round(break_even_batch(group_size, pass_bytes=pass_bytes)),
    ]
    assert f"| {' | '.join(map(str, cells))} |" in (DOCS / "hybrid.md").read_text(encoding="utf-8")


def test_the_other_split_would_send_as_much_less_as_the_text_says():
    text = " ".join((DOCS / "hybrid.md").read_text(encoding="utf-8").split())
    said = re.findall(r"(\d+) % fewer at K = (\d+)", text)
    assert len(said) == 2
    for percent, group_size in said:
        ours, other = FC6_IN + HIDDEN + 1000, FC6_IN / int(group_size) + 2 * HIDDEN + 1000
        assert round(100 * (1 - other / ours)) == int(percent)


def test_the_closed_form_in_the_text_is_that_of_the_column_of_break_even_batches():
    text = (DOCS / "hybrid.md").read_text(encoding="utf-8")
    (millions, fc6_in, hidden) = re.search(r"b = ([\d.]+) M / \(K \((\d+) \+ (\d+) \+ C\)\)", text).groups()
    assert float(millions) == round(fc_parameters(1000) / 1e6, 1)
    assert (int(fc6_in), int(hidden)) == (FC6_IN, HIDDEN)
    for group_size in (2, 4, 8, 16):
        by_text = float(millions) * 1e6 / (group_size * (int(fc6_in) + int(hidden) + 1000))
        assert break_even_batch(group_size, pass_bytes=4) == pytest.approx(by_text, rel=1e-3)
