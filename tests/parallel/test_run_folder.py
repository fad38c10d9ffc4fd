"""A run folder that two jobs want, and one whose owner was killed, under real launchers."""

from real_ranks import NARROW, SMALL, outcome, records, settings, steps_done, wait_for

from horovod_owt.runs.checkpoints import list_checkpoints


def test_a_second_job_is_refused_and_follows_when_the_first_is_killed(start, run, images, tmp_path):
    """Then it resumes from the run's checkpoint, although it names the one that the run began from."""
    base, run_dir = tmp_path / "base", tmp_path / "run"
    command = [*NARROW, "train", images, *SMALL]
    run([*command, "--run-dir", base, *settings(max_steps=1)], launcher="none")
    (origin,) = list_checkpoints(base)
    command += ["--run-dir", run_dir, "--resume", origin, *settings(checkpoint_every=1)]
    first = start([*command, *settings(epochs=1000)], launcher="none")
    wait_for(lambda: steps_done(run_dir) >= 3)

    refused = run([*command, *settings(max_steps=2)], launcher="horovodrun", exit_code=None)
    assert refused.exit_code != 0
    assert f"run folder {run_dir} is in use by process {first.process.pid} on " in refused.stderr
    assert "a bug" not in refused.stderr and len(records(run_dir, "run")) == 1
    assert first.process.poll() is None and not (run_dir / "outcome.json").exists()

    first.kill()
    first.process.wait()
    newest = int(list_checkpoints(run_dir)[0].name[5:])
    done = run([*command, *settings(max_steps=newest + 1)], launcher="mpirun")
    assert f"taken over from process {first.process.pid} on " in done.stderr
    assert f"resuming from {run_dir}/checkpoints/step-{newest:08d}" in done.stderr
    assert outcome(run_dir)["exit_code"] == 0 and records(run_dir, "run")[-1]["first_step"] == newest
