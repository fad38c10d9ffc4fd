"""Ranks that torchrun starts are ranks of one Horovod job."""

import pytest
from real_ranks import NARROW, SMALL, records, settings


@pytest.mark.slow
def test_torchrun_trains_as_horovodrun_does(run, images, tmp_path):
    losses = {}
    for launcher in ("horovodrun", "torchrun"):
        command = [*NARROW, "train", images, "--run-dir", tmp_path / launcher, *SMALL, *settings(max_steps=3)]
        run(command, launcher=launcher)
        (start,) = records(tmp_path / launcher, "run")
        assert start["world_size"] == 2
        losses[launcher] = [step["loss"] for step in records(tmp_path / launcher, "step")]
    assert len(losses["torchrun"]) == 3
    assert losses["torchrun"] == pytest.approx(losses["horovodrun"], rel=1e-6)


def test_what_looks_at_a_job_before_it_starts_does_so_under_torchrun(run, tmp_path):
    """Ranks meet without Horovod there."""
    found = run([*NARROW, "devices", "--json"], launcher="torchrun").json()
    assert [rank["rank"] for rank in found["devices"]] == [0, 1]
