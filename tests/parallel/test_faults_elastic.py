"""Elastic jobs: ranks are killed, hosts come and go, and the run is what an undisturbed one is."""

import shutil
import signal
import time
from functools import partial

import pytest
import torch
from real_ranks import (
    NARROW,
    OWT,
    SMALL,
    VENV_BIN,
    outcome,
    ranks_below,
    records,
    settings,
    steps_done,
    wait_for,
)
from safetensors.torch import load_file

from horovod_owt.runs.checkpoints import list_checkpoints, step_of
from horovod_owt.runs.records import last_step

ELASTIC = [VENV_BIN / "owt", "launch", "elastic"]
EXACT = settings(precision="fp64", dropout=0.0, epochs=1000, checkpoint_every=0, commit_every=3)
PEAK_LR = 0.01  # of 8 images


def worlds(run_dir) -> list[tuple[int, int]]:
    """First step and number of ranks each time that ranks formed a job."""
    if not (run_dir / "metrics.jsonl").exists():
        return []
    return [(r["first_step"], r["world_size"]) for r in records(run_dir, "run")]


def wait_for_steps_of(run_dir, world: int, steps: int = 4) -> None:
    """Until the `world`-th world of ranks, counted from 1, has made some."""
    wait_for(lambda: len(worlds(run_dir)) >= world, 180)
    before = steps_done(run_dir)
    wait_for(lambda: steps_done(run_dir) >= before + steps)


def has_step_of(run_dir, world: int) -> bool:
    """Whether the `world`-th world has made a step."""
    found = worlds(run_dir)[world - 1 :]
    return bool(found) and last_step(run_dir)[0] > found[0][0]


def what_counts(run_dir) -> dict[int, dict]:
    """Of each step, its last line: those before were taken back with the world that made them."""
    return {r["step"]: r for r in records(run_dir, "step")}


def test_a_killed_rank_comes_back_and_the_run_is_that_of_one_process(
    start, run, images, tmp_path, narrow_owt, chance
):
    """Which rank and when, chance says; the global batch is kept, so every loss must be the same.

    As must be the moving average of the weights.
    """
    elastic, alone = tmp_path / "elastic", tmp_path / "alone"
    train = [images, *SMALL, *EXACT, *settings(ema=0.9)]
    options = ["--ranks", "2", "--cooldown", "1", "4", "--", *train, "--run-dir", elastic]
    job = start([*ELASTIC, *options, *settings(elastic_batch="keep")], launcher="none", **narrow_owt)
    at_step = chance.randint(4, 12)
    wait_for(lambda: steps_done(elastic) >= at_step)
    ranks_below(job.process.pid)[chance.randint(0, 1)].kill()
    wait_for_steps_of(elastic, 3)
    wait_for(lambda: records(elastic, "validation"))
    job.process.send_signal(signal.SIGTERM)
    done = job.finish()
    assert done.exit_code == 75, done.stderr[-3000:]
    assert [ranks for _, ranks in worlds(elastic)] == [2, 1, 2]
    lost, came = records(elastic, "fault")
    assert "a rank was lost" in lost["fault"] and "hosts joined or left" in came["fault"]
    assert 0 <= lost["step"] - worlds(elastic)[1][0] <= 3 and worlds(elastic)[1][0] % 3 == 0
    steps = what_counts(elastic)
    assert list(steps) == list(range(1, outcome(elastic)["step"] + 1))
    run(
        [*NARROW, "train", *train, "--run-dir", alone, *settings(max_steps=len(steps), batch=8)],
        launcher="none",
    )
    for step, line in what_counts(alone).items():
        assert steps[step]["loss"] == pytest.approx(line["loss"], rel=1e-6)
        assert (steps[step]["epoch"], steps[step]["lr"]) == (line["epoch"], line["lr"])
    # and so whatever is scored, then and later
    for name in ("model.safetensors", "average.safetensors"):
        weights, same = (load_file(list_checkpoints(folder)[0] / name) for folder in (elastic, alone))
        torch.testing.assert_close(weights, same, rtol=1e-6, atol=1e-9)
    scores = [{r["step"]: r["correct_top1"] for r in records(f, "validation")} for f in (elastic, alone)]
    assert scores[0] and scores[0].items() <= scores[1].items()


def test_hosts_come_and_go_with_the_lines_of_a_file(start, images, tmp_path, narrow_owt):
    """The learning rate follows the number of ranks, and each place in the epoch is that of its images.

    With compressed gradients, whose errors each world takes over from the one before.
    """
    hosts, run_dir = tmp_path / "hosts", tmp_path / "run"
    hosts.write_text("localhost:1\n")
    options = ["--hosts", hosts, "--", images, *SMALL, *EXACT, "--run-dir", run_dir]
    options += settings(compression="onebit")
    job = start([*ELASTIC, *options], launcher="none", **narrow_owt)
    wait_for_steps_of(run_dir, 1)
    hosts.write_text("localhost:1  # stays\n127.0.0.1 slots=1\n")
    wait_for_steps_of(run_dir, 2)
    hosts.write_text("localhost:1\n")
    wait_for_steps_of(run_dir, 3)
    job.process.send_signal(signal.SIGUSR1)
    done = job.finish()
    assert done.exit_code == 75, done.stderr[-3000:]
    assert [ranks for _, ranks in worlds(run_dir)] == [1, 2, 1]
    firsts = [first for first, _ in worlds(run_dir)]
    steps, consumed = what_counts(run_dir), 0
    assert list(steps) == list(range(1, outcome(run_dir)["step"] + 1))
    for step, line in steps.items():
        ranks = 2 if firsts[1] < step <= firsts[2] else 1
        consumed += 4 * ranks
        assert line["lr"] == pytest.approx(PEAK_LR * ranks / 2)
        assert line["epoch"] == pytest.approx(consumed / 96)


@pytest.mark.slow
def test_a_rank_that_joins_with_other_data_is_refused_alone(start, images, tmp_path, narrow_owt):
    """As one with other versions or code; the rank that is at work goes on from its last commit."""
    hosts, run_dir, data = tmp_path / "hosts", tmp_path / "run", tmp_path / "data"
    shutil.copytree(images, data)
    hosts.write_text("localhost:1\n")
    options = ["--hosts", hosts, "--cooldown", "60", "90", "--", data, *SMALL, *EXACT, "--run-dir", run_dir]
    job = start([*ELASTIC, *options], launcher="none", **narrow_owt)
    wait_for_steps_of(run_dir, 1)
    image = next((data / "train").rglob("*.JPEG"))
    shutil.copy(image, image.with_name("another.JPEG"))
    hosts.write_text("localhost:1\n127.0.0.1:1\n")
    wait_for_steps_of(run_dir, 2)
    job.process.send_signal(signal.SIGTERM)
    done = job.finish()
    assert done.exit_code == 75, done.stderr[-3000:]
    assert {ranks for _, ranks in worlds(run_dir)} == {1}
    assert any("ranks that joined are refused" in record["fault"] for record in records(run_dir, "fault"))
    assert list(what_counts(run_dir)) == list(range(1, outcome(run_dir)["step"] + 1))


@pytest.mark.slow
def test_a_job_below_its_minimum_continues_as_soon_as_its_hosts_return(start, images, tmp_path, narrow_owt):
    """Three hosts, one, three again, several times; with one it waits."""
    three, one = "localhost:1\n127.0.0.1:1\n127.0.0.01:1\n", "localhost:1\n"
    hosts, run_dir = tmp_path / "hosts", tmp_path / "run"
    hosts.write_text(three)
    options = ["--hosts", hosts, "--min-ranks", "2", "--", images, *SMALL, *EXACT, "--run-dir", run_dir]
    job = start([*ELASTIC, *options], launcher="none", **narrow_owt)
    wait_for_steps_of(run_dir, 1)
    for world in (2, 3, 4):
        hosts.write_text(one)
        wait_for(lambda: time.time() - (run_dir / "metrics.jsonl").stat().st_mtime > 3)
        assert len(worlds(run_dir)) == world - 1
        hosts.write_text(three)
        wait_for(partial(has_step_of, run_dir, world), 30)
    job.process.send_signal(signal.SIGTERM)
    done = job.finish()
    assert done.exit_code == 75, done.stderr[-3000:]
    assert [ranks for _, ranks in worlds(run_dir)] == [3, 3, 3, 3]
    assert list(what_counts(run_dir)) == list(range(1, outcome(run_dir)["step"] + 1))


@pytest.mark.slow
def test_a_job_that_resumes_with_fewer_ranks_keeps_the_global_batch(run, images, tmp_path, narrow_owt):
    train = [images, *SMALL, *EXACT, *settings(elastic_batch="keep"), "--run-dir", tmp_path / "run"]
    for ranks, steps in ((2, 2), (1, 4)):
        options = ["--ranks", ranks, "--", *train, *settings(max_steps=steps)]
        run([*ELASTIC, *options], launcher="none", **narrow_owt)
    assert worlds(tmp_path / "run") == [(0, 2), (2, 1)]
    for step, line in what_counts(tmp_path / "run").items():
        assert (line["epoch"], line["lr"]) == (pytest.approx(8 * step / 96), pytest.approx(PEAK_LR))


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["validation", "last checkpoint"])
def test_what_rank_0_leaves_undone_the_next_one_does(run, images, tmp_path, narrow_owt, phase):
    """The others have committed the step by then."""
    owt, run_dir, died = tmp_path / "bin" / "owt", tmp_path / "run", tmp_path / "died"
    owt.write_text(owt.read_text().replace("narrow.py", "dying.py"))
    train = [images, *SMALL, *EXACT, *settings(elastic_batch="keep", epochs=1), "--run-dir", run_dir]
    options = ["--ranks", "2", "--cooldown", "1", "4", "--", *train]
    environ = narrow_owt | {"OWT_TEST_DIES_IN": phase, "OWT_TEST_DIED": str(died)}
    run([*ELASTIC, *options], launcher="none", **environ)
    assert died.exists() and worlds(run_dir)[1][0] == 12
    assert list(what_counts(run_dir)) == list(range(1, 13))
    assert [record["step"] for record in records(run_dir, "validation")] == [12]
    assert step_of(list_checkpoints(run_dir)[0]) == 12


def test_hybrid_is_refused(run, images):
    command = [*OWT, "train", images, *SMALL, "--parallel", "hybrid"]
    done = run(command, launcher="none", exit_code=2, HOROVOD_ELASTIC="1")
    assert "FC layers are lost with it" in done.stderr and "fix: --parallel data" in done.stderr
