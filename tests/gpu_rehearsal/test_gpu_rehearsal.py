"""What a training step on a GPU may cost, by the rehearsal on fake CUDA tensors: no GPU is needed.

A failure lists the lines of the code that cost more than they may. All figures are of one rank.
"""

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.timeout(500),
    pytest.mark.skipif(not shutil.which("cc"), reason="the stand-in for the CUDA runtime is C"),
]

REHEARSE = Path(__file__).with_name("rehearse.py")
# Kernels and collectives of a step in today's code. Fewer are welcome: lower the number.
BUDGET = {
    "alone bf16": (118, 0),
    "alone fp32": (74, 0),
    "data fp32": (74, 19),
    "data bf16": (118, 19),
    "data fp16": (120, 19),
    "data fp64": (76, 19),
    "data fp16 clip accum": (300, 19),
    "data bf16 clip accum": (411, 19),
    "data fp32 compression": (110, 19),
    "data bf16 contiguous": (113, 19),
    "data bn bf16": (171, 19),
    "data bn fp32 sync_bn": (369, 33),
    "data bn fp16 sync_bn": (435, 33),
    "hybrid a fp32": (77, 18),
    "hybrid a bf16": (120, 18),
    "hybrid a bf16 all": (120, 11),
    "hybrid a bf16 uneven": (120, 11),
    "hybrid a bf16 clip accum": (307, 25),
    "hybrid a bn sync_bn": (372, 32),
    "hybrid a bn bf16": (184, 18),
    "hybrid a smoothing compression": (112, 18),
    "hybrid b fp32": (111, 23),
    "hybrid b bf16 accum": (322, 34),
    "hybrid b local bf16": (207, 32),
    "hybrid b local bn": (218, 32),
}


@cache
def results() -> dict:
    """One program rehearses all, so that torch's start is paid once."""
    done = subprocess.run([sys.executable, REHEARSE, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def phase(case: str, name: str) -> dict[str, dict[str, int]]:
    return results()["cases"][case][name]


def lines(counts: dict[str, int]) -> str:
    return "\n".join(f"{number} x {line}" for line, number in sorted(counts.items()))


@pytest.mark.parametrize("case", BUDGET)
def test_a_step_waits_for_the_gpu_once_and_copies_from_pinned_memory(case):
    step = phase(case, "step")
    assert sum(step["host_syncs"].values()) <= 1, lines(step["host_syncs"])
    assert not step["blocking_copies"], lines(step["blocking_copies"])
    assert not step["pageable_copies"], lines(step["pageable_copies"])


@pytest.mark.parametrize("case", BUDGET)
def test_a_step_keeps_its_budget_of_kernels_and_collectives(case):
    kernels, collectives = BUDGET[case]
    step = phase(case, "step")
    assert sum(step["kernels"].values()) <= kernels, lines(step["kernels"])
    assert sum(step["collectives"].values()) <= collectives, lines(step["collectives"])


def test_every_case_has_a_budget():
    assert results()["cases"].keys() == BUDGET.keys()


@pytest.mark.parametrize("case", ["alone bf16", "data bf16", "hybrid a bf16"])
def test_the_common_steps_take_at_most_120_kernels(case):
    assert BUDGET[case][0] <= 120


WHOLE_RUNS = ["alone bf16", "data fp32", "data fp16", "data bn bf16", "hybrid a bf16", "hybrid b local bn"]


@pytest.mark.parametrize("case", WHOLE_RUNS)
def test_a_checkpoint_is_copied_to_pinned_memory_with_one_wait(case):
    """fp16 reads its loss scale too, in two numbers."""
    syncs = phase(case, "checkpoint")["host_syncs"]
    assert sum(syncs.values()) <= (3 if "fp16" in case else 1), lines(syncs)


@pytest.mark.parametrize("case", WHOLE_RUNS)
def test_a_resumed_run_copies_from_pinned_memory(case):
    seen = phase(case, "resume")
    assert not seen["blocking_copies"], lines(seen["blocking_copies"])
    assert not seen["pageable_copies"], lines(seen["pageable_copies"])


@pytest.mark.parametrize("case", [case for case in WHOLE_RUNS if "hybrid" not in case])
@pytest.mark.parametrize("name", ["first commit", "commit", "restore commit"])
def test_commits_stay_on_the_gpu(case, name):
    seen = phase(case, name)
    assert not seen["copies"], lines(seen["copies"])
    assert sum(seen["host_syncs"].values()) <= (2 if "fp16" in case else 0), lines(seen["host_syncs"])


@pytest.mark.parametrize("case", WHOLE_RUNS)
def test_validation_waits_once_a_batch(case):
    syncs = phase(case, "validation")["host_syncs"]
    assert sum(syncs.values()) <= 2, lines(syncs)


@pytest.mark.parametrize("kind", ["pillow", "nvjpeg"])
def test_a_batch_goes_to_the_gpu_as_pinned_bytes(kind):
    seen = results()["pipelines"][kind]
    for what in ("host_syncs", "blocking_copies", "pageable_copies"):
        assert not seen[what], lines(seen[what])
    assert {line.rpartition(" ")[2] for line in seen["copies"]} <= {"uint8", "int64", "bool"}


def test_auto_times_its_parts_on_a_gpu():
    assert set(results()["chosen"]) <= {"data", "hybrid"}
