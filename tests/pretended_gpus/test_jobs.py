"""`owt train` on pretended GPUs: who died or hangs is named, and elastic ranks regroup."""

import pytest
from real_ranks import SMALL, VENV_BIN, outcome, ranks_below, records, settings, steps_done, wait_for

TRAIN = settings(max_steps=400, checkpoint_every=0, pipeline="torchvision", dropout=0.0)


@pytest.fixture
def job(start, owt_on_gpus, images, tmp_path):
    """`owt train` on two ranks; its run folder."""

    def job(*words, **environ):
        argv = ["owt", "train", images, "--run-dir", tmp_path / "run", *SMALL, *TRAIN, *words]
        return start(argv, **owt_on_gpus | environ), tmp_path / "run"

    return job


def test_a_rank_killed_in_a_collective_is_named(job):
    started, run_dir = job(PRETENDED_NCCL_FAULT="kill@1:60")
    done = started.finish(120)
    assert done.exit_code != 0
    assert "lost contact with rank 1" in outcome(run_dir)["reason"]


def test_a_rank_stopped_in_a_collective_is_named_within_the_stall_limit(job):
    started, run_dir = job(*settings(stall_limit_s=10), PRETENDED_NCCL_FAULT="stop@1:60")
    wait_for(lambda: (run_dir / "outcome.json").exists())
    assert "stalled: rank 1 on" in outcome(run_dir)["reason"]


def test_nccls_reason_ends_the_job(job):
    started, run_dir = job(PRETENDED_NCCL_FAULT="async@1:60")
    done = started.finish(120)
    assert done.exit_code != 0
    assert "NCCL async error: remote process exited or there was a network error" in done.stderr


def test_elastic_ranks_regroup_and_go_on(start, owt_on_gpus, images, tmp_path):
    run_dir = tmp_path / "run"
    train = [images, *SMALL, *TRAIN, *settings(commit_every=3), "--run-dir", run_dir]
    argv = [VENV_BIN / "owt", "launch", "elastic", "--ranks", "2", "--cooldown", "1", "4", "--", *train]
    started = start(argv, launcher="none", **owt_on_gpus)
    wait_for(lambda: steps_done(run_dir) >= 5, 180)
    ranks_below(started.process.pid)[1].kill()
    wait_for(lambda: len(records(run_dir, "run")) >= 2, 120)
    before = steps_done(run_dir)
    wait_for(lambda: steps_done(run_dir) > before + 3, 120)
    lost = records(run_dir, "fault")[0]  # on a busy machine its place is taken again at once
    assert "a rank was lost" in lost["fault"] and records(run_dir, "run")[1]["first_step"] > 0
