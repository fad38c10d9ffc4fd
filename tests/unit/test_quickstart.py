"""What launch/quickstart prints of the run that it has started."""

import importlib.util
import json
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "quickstart"


def load():
    loader = SourceFileLoader("quickstart", str(SCRIPT))
    quickstart = importlib.util.module_from_spec(importlib.util.spec_from_loader("quickstart", loader))
    loader.exec_module(quickstart)
    return quickstart


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, ["batch=64"]),
        (2, ["batch=32"]),
        (4, ["batch=16", "sync_bn=true"]),
        (8, ["batch=8", "sync_bn=true"]),
        (100, ["batch=1", "sync_bn=true"]),
    ],
)
def test_more_ranks_train_with_the_same_global_batch(ranks, settings):
    assert load().batch_settings(ranks) == [word for one in settings for word in ("--set", one)]


def test_the_result_is_that_of_the_last_validation_and_of_all_steps(tmp_path, capsys):
    step = {"kind": "step", "step_ms": 500.0, "images_per_s": 100.0}
    records = [
        {"kind": "run"},
        step,
        {"kind": "validation", "top1": 40.0, "correct_top1": 200, "images": 500},
        {**step, "images_per_s": 300.0},
        {"kind": "validation", "top1": 96.2, "correct_top1": 481, "images": 500},
        {"kind": "outcome"},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert load().print_result(tmp_path, ranks=2, seconds=3.4) == 96.2
    said = capsys.readouterr().out
    assert "96.2 % (481 of 500 images)" in said and "200 images/s on 2 ranks" in said
    assert "1 s in training steps, 3 s in all" in said
