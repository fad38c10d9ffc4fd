"""Runs that are told to stop: they end at a checkpoint, and the next one goes on as if nothing had been."""

import signal
import time

import pytest
import torch
from real_ranks import NARROW, PROGRAMS, SMALL, outcome, ranks_below, records, settings, steps_done, wait_for
from safetensors.torch import load_file

from horovod_owt.data.order import SampleOrder
from horovod_owt.runs.checkpoints import find_fault, list_checkpoints
from horovod_owt.train.checkpoint import read_checkpoint

STEPS = 20  # more than one machine does before a signal arrives; 12 an epoch


def test_stopped_at_any_rank_and_resumed_a_run_equals_the_unbroken_one(start, run, images, tmp_path, chance):
    """Bit for bit, at steps that chance chooses, with all that a run remembers or that follows its epoch."""
    command = [*NARROW, "train", images, *SMALL]
    command += settings(max_steps=STEPS, dropout=0.5, model="alexnet-owt-bn", ema=0.9)
    command += settings(image_size="[[0, 64], [1, 80]]", compression="onebit", compression_start=1)
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    run([*command, "--run-dir", unbroken])
    for number, rank in (("SIGTERM", 0), ("SIGINT", 1)):
        job = start([*command, "--run-dir", broken])
        before, more = steps_done(broken), chance.randint(1, 4)
        wait_for(lambda at_least=before + more: steps_done(broken) >= at_least)
        ranks_below(job.process.pid)[rank].send_signal(getattr(signal, number))
        done = job.finish()
        assert done.exit_code != 0 and outcome(broken)["exit_code"] == 75, done.stderr[-2000:]
        assert f"stopped by {number} to rank {rank} on " in outcome(broken)["reason"]
        assert list_checkpoints(broken)[0].name == f"step-{outcome(broken)['step']:08d}"
        assert steps_done(broken) == outcome(broken)["step"] < STEPS
    run([*command, "--run-dir", broken])
    losses = [[(r["step"], r["loss"]) for r in records(folder, "step")] for folder in (broken, unbroken)]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
    scores = [{r["step"]: r["loss"] for r in records(folder, "validation")} for folder in (broken, unbroken)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5) and list(scores[0]) == [12, STEPS]
    for name in ("model.safetensors", "average.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(list_checkpoints(folder)[0] / name) for folder in (broken, unbroken))
        assert ours.keys() == theirs.keys()
        for key in theirs:
            off = 1e-6 if "running" in key else 0  # an average of averages is rounded once more
            torch.testing.assert_close(ours[key], theirs[key], rtol=off, atol=off)


def test_a_second_ctrl_c_ends_a_long_step_at_once_and_the_last_checkpoint_stays(start, run, images, tmp_path):
    """As does KILL after too short a time of grace."""
    command = [*NARROW, "train", images, *SMALL, "--run-dir", tmp_path]
    run([*command, *settings(max_steps=2)], launcher="none")
    endless = settings(max_steps=4, accum_steps=1000)
    job = start([*command, *endless], launcher="none")
    wait_for(lambda: len(records(tmp_path, "run")) == 2)
    asked = time.monotonic()
    while job.process.poll() is None and time.monotonic() < asked + 20:
        job.process.send_signal(signal.SIGINT)
        time.sleep(0.1)  # two that come as one would be one
    assert job.process.wait(timeout=0) == -signal.SIGINT
    assert time.monotonic() - asked < 5
    job = start([*command, *endless], launcher="none")
    wait_for(lambda: len(records(tmp_path, "run")) == 3)
    job.process.terminate()
    job.process.kill()
    assert job.finish().exit_code in (-signal.SIGKILL, -signal.SIGTERM)
    (checkpoint,) = list_checkpoints(tmp_path)
    assert checkpoint.name == "step-00000002" and find_fault(checkpoint) == ""
    run([*command, *settings(max_steps=3)], launcher="none")
    assert [r["step"] for r in records(tmp_path, "step")] == [1, 2, 3]


def test_a_stop_during_validation_leaves_it_to_the_next_run(run, images, tmp_path):
    command = ["train", images, "--run-dir", tmp_path, *SMALL, *settings(max_steps=2)]
    done = run(["python", PROGRAMS / "stop_in_validation.py", *command], exit_code=None)
    assert done.exit_code != 0
    assert outcome(tmp_path)["exit_code"] == 75 and "SIGTERM to rank 1" in outcome(tmp_path)["reason"]
    assert records(tmp_path, "validation") == []
    run([*NARROW, *command])
    (score,) = records(tmp_path, "validation")
    assert score["step"] == 2 and score["images"] == 26
    assert steps_done(tmp_path) == 2


def test_a_loss_that_is_no_number_on_one_rank_ends_all_in_that_step(run, images, tmp_path):
    """Rank 1 meets NaN pixels in step 3. The checkpoint of step 2 stays, whole."""
    command = ["train", images, "--run-dir", tmp_path, *SMALL, *settings(max_steps=5, checkpoint_every=1)]
    done = run(["python", PROGRAMS / "nan_pixels.py", *command], exit_code=None)
    assert done.exit_code != 0
    assert outcome(tmp_path)["exit_code"] == 1 and outcome(tmp_path)["step"] == 2
    reason = outcome(tmp_path)["reason"]
    assert reason.startswith("loss is nan at step 3, lr 1.00e-02, image indices [")
    _, indices = SampleOrder(96, seed=0).at(16, 8)
    assert str(indices.tolist()) in reason
    newest = list_checkpoints(tmp_path)[0]
    assert read_checkpoint(newest).state["step"] == 2  # checked by its sha256


def test_ranks_that_differ_are_refused_with_a_table_of_values_and_ranks(run, images, tmp_path):
    command = ["python", PROGRAMS / "disagree.py", "train", images, "--run-dir", tmp_path, *SMALL]
    done = run(command, ranks=3, exit_code=None)
    assert done.exit_code != 0
    table = [line.split("<stderr>:")[-1].split(": rank")[0].strip() for line in done.stderr.splitlines()]
    assert any(line.endswith("ranks disagree on version, code, config, data:") for line in table)
    for row in ("0.0.1", "config lr  0.01", "0.5"):
        assert row in table, done.stderr
    assert "0.5: rank 1 (localhost)" in done.stderr and "0.01: ranks 0 (localhost), 2 (" in done.stderr
    assert any(line.startswith("data set  96 + 26 images of 2 classes, sha256 ") for line in table)
    assert any(line.startswith("95 + 26 images of 2 classes, sha256 ") for line in table)
    assert "config momentum" not in done.stderr
    assert not (tmp_path / "config.json").exists()
