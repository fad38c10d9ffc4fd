"""`--parallel auto` measures, says what it chose, and trains with it."""

import json
import re

import pytest
from real_ranks import NARROW, SMALL, records


def test_auto_prints_its_choice_with_both_predictions_and_uses_it(run, images, tmp_path):
    more = ["--set", "max_steps=1"]
    done = run(
        [*NARROW, "train", images, "--run-dir", tmp_path, *SMALL, "--parallel", "auto", *more], limit_s=200
    )
    (line,) = re.findall(r"parallel auto: .*", done.stderr + done.stdout)
    said = re.fullmatch(
        r"parallel auto: (data|hybrid) \(predicted ([\d.e-]+) s a step on 2 ranks; "
        r"(data|hybrid) ([\d.e-]+) s\); override with --parallel (data|hybrid)",
        line.strip(),
    )
    choice, seconds, other, other_seconds, overruled = said.groups()
    assert {choice, other} == {"data", "hybrid"} and overruled == other
    assert float(seconds) <= float(other_seconds)

    assert json.loads((tmp_path / "config.json").read_text())["parallel"] == choice
    (first,) = records(tmp_path, "run")
    assert first["predicted_step_ms"][choice] == pytest.approx(1e3 * float(seconds), rel=0.01)
    assert first["predicted_step_ms"][other] == pytest.approx(1e3 * float(other_seconds), rel=0.01)
    (step,) = records(tmp_path, "step")
    assert step["bytes_sent"] == first["bytes_sent_per_step_expected"]
    assert ("features" in step["bytes_sent"]) == (choice == "hybrid")
