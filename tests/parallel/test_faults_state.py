"""Runs that are killed while they keep more than weights: averages, growing images, errors of compression."""

from pathlib import Path

import pytest
import torch
from real_ranks import NARROW, PROGRAMS, SMALL, outcome, records, settings
from safetensors.torch import load_file

from horovod_owt.parallel.compression import ERROR, OWNER_ERROR
from horovod_owt.runs.checkpoints import list_checkpoints
from horovod_owt.train.replica import AVERAGE, MOMENTUM

STEPS, EPOCH = 18, 12  # of 8 images
COMPRESSION_START = 8
EMA = 0.9


def content(run_dir: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint; the average has a prefix."""
    folder = list_checkpoints(run_dir)[0]
    average = load_file(folder / "average.safetensors")
    weights = load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")
    return weights | {f"{AVERAGE}{name}": tensor for name, tensor in average.items()}


def what_counts(run_dir: Path, kind: str) -> dict[int, float]:
    """The loss of each step in its last record: a killed run has repeated some."""
    return {record["step"]: record["loss"] for record in records(run_dir, kind)}


def errors_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What compressed gradients still owe each matrix: the errors of all ranks, and of the owners of sums."""
    found = {}
    for name in tensors:
        if name.startswith(ERROR):
            matrix = name.removeprefix(ERROR)
            of_ranks = tensors[name].view(-1, *tensors[matrix].shape).double().sum(dim=0)
            found[matrix] = of_ranks + tensors.get(f"{OWNER_ERROR}{matrix}", 0)
    return found


def assert_carried_over(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    """After a step that left the weights as they are, without compression, on another number of ranks."""
    weights = [name for name in before if MOMENTUM + name in before]
    assert weights
    for name in weights:
        assert torch.equal(after[name], before[name])
        average = before[f"{AVERAGE}{name}"].lerp(before[name], 1 - EMA)
        assert torch.equal(after[f"{AVERAGE}{name}"], average)
    errors, same = errors_of(before), errors_of(after)
    assert errors and all(error.any() for error in errors.values())
    for name, error in errors.items():
        torch.testing.assert_close(same[name], error, rtol=1e-5, atol=1e-6 * error.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize(("compression", "other_ranks"), [("onebit", 3), ("powersgd:2", 1)])
def test_a_killed_run_keeps_its_average_image_size_and_compression_errors(
    run, images, tmp_path, chance, compression, other_ranks
):
    """To the bit, killed once before and once after images grow and compression starts.

    Another number of ranks then resumes from its end, with the same average and the same sum of the errors.
    """
    train = ["train", images, *SMALL]
    train += settings(max_steps=STEPS, dropout=0.5, model="alexnet-owt-bn", ema=EMA, checkpoint_every=2)
    train += settings(image_size="[[0, 64], [1, 80]]")
    train += settings(compression=compression, compression_start=COMPRESSION_START)
    killed, unbroken = tmp_path / "killed", tmp_path / "unbroken"
    run([*NARROW, *train, "--run-dir", unbroken])

    victim = chance.randint(0, 1)
    for rank, first, last in ((victim, 5, COMPRESSION_START - 1), (1 - victim, EPOCH + 1, STEPS - 1)):
        kill = f"{rank} {chance.randint(first, last)} {chance.uniform(0, 0.05)}"
        program = ["python", PROGRAMS / "killed.py", *train, "--run-dir", killed]
        done = run(program, exit_code=None, OWT_TEST_KILL=kill)
        assert done.exit_code != 0 and "lost contact with rank" in outcome(killed)["reason"], done.stderr
    run([*NARROW, *train, "--run-dir", killed])
    firsts = [record["first_step"] for record in records(killed, "run")]
    assert firsts[0] == 0 < firsts[1] <= COMPRESSION_START < firsts[2] < STEPS

    for kind in ("step", "validation"):
        assert what_counts(killed, kind) == what_counts(unbroken, kind)
    ours, theirs = content(killed), content(unbroken)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []

    other = tmp_path / "other"
    command = [*NARROW, *train, "--run-dir", other, "--resume", list_checkpoints(killed)[0]]
    run([*command, *settings(lr=1e-30, max_steps=STEPS + 1, compression_start=STEPS + 1)], ranks=other_ranks)
    assert_carried_over(ours, content(other))
