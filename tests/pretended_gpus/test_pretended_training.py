"""Training on pretended GPUs ends at the weights of one process on the CPU."""

import json
import sys

import pytest
import torch
from conftest import PROGRAMS
from safetensors.torch import load_file

EXACT = dict(image_size=63, classes=10, dropout=0.5, lr=0.02, seed=7, precision="fp64")
HYBRID = {"parallel": "hybrid", "fc_group_size": 2}
RUNS = {
    2: {
        "data": {},
        "data-accum": {"accum_steps": 2},
        "a": {**HYBRID, "owt_scheme": "a"},
        "b": {**HYBRID, "owt_scheme": "b"},
    },
    4: {"data": {}, "2x2-a": {**HYBRID, "owt_scheme": "a"}, "one-group": {**HYBRID, "fc_group_size": 4}},
}


def plans(ranks: int, named: dict[str, dict]) -> str:
    batch = {name: 8 // ranks // settings.get("accum_steps", 1) for name, settings in named.items()}
    return json.dumps(
        [
            {
                "name": name,
                "steps": 3,
                "evaluate": False,
                "settings": {**EXACT, "batch": batch[name], **settings},
            }
            for name, settings in named.items()
        ]
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory, on_gpus):
    """One process on the CPU, with the whole batch."""
    from real_ranks import launch

    out = tmp_path_factory.mktemp("alone")
    argv = [sys.executable, PROGRAMS / "train.py", out, plans(1, {"plain": {}})]
    with launch(argv, launcher="none", **on_gpus | {"CUDA_VISIBLE_DEVICES": ""}) as job:
        done = job.finish()
    assert done.exit_code == 0, done.stderr[-4000:]
    assert json.loads((out / "plain.json").read_text())["device"] == "cpu"
    return load_file(out / "plain.safetensors"), json.loads((out / "plain.json").read_text())["losses"]


@pytest.mark.parametrize("ranks", RUNS)
def test_every_strategy_ends_at_the_weights_of_one_cpu_process(run, on_gpus, alone, tmp_path, ranks):
    run([sys.executable, PROGRAMS / "train.py", tmp_path, plans(ranks, RUNS[ranks])], ranks=ranks, **on_gpus)
    for name in RUNS[ranks]:
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert record["device"].startswith("cuda")
        assert record["losses"] == pytest.approx(alone[1], rel=1e-6), name  # ranks share them in fp32
        weights = load_file(tmp_path / f"{name}.safetensors")
        torch.testing.assert_close(
            weights, alone[0], rtol=1e-9, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
        )
