"""Real jobs on a real Slurm of three nodes: to the end, preempted, without a node, out of time, cancelled."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
VENV_BIN = Path(sys.executable).parent
SMALL = ["--recipe", REPO / "tests" / "parallel" / "small.yaml"]
FINISHED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
STEPS = 18  # 6 an epoch
LIMIT_S = 120
OWT_JOB = ["owt", "job"]


def settings(**values) -> list[str]:
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def wait_for(condition, limit_s: float = LIMIT_S, *, log: Path | None = None, every_s: float = 0.1):
    """Poll until `condition` gives something true, and return that; else fail with the job's log."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(every_s)
    pytest.fail(f"waited {limit_s} s in vain\n{log.read_text()[-6000:] if log and log.exists() else ''}")


def records(run_dir: Path, kind: str) -> list[dict]:
    if not (run_dir / "metrics.jsonl").exists():
        return []
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in records(run_dir, "step")]


def submit(slurm, folder: Path, images: Path, *options: str, owt: list = ()) -> str:
    """A job by `owt job submit` in `folder`; its log is `folder/log`."""
    argv = [*OWT_JOB, "submit", "--output=log", *options, str(images), "--", *map(str, [*SMALL, *owt])]
    return slurm.run(*argv, cwd=folder).strip()


def status(slurm, job_id: str, *options: str) -> dict:
    return json.loads(slurm.run(*OWT_JOB, "status", job_id, "--json", *options))


def end_of(slurm, job_id: str, log: Path) -> str:
    """The state in which the job ended."""
    wait_for(lambda: slurm.job(job_id)["JobState"] in FINISHED, log=log, every_s=0.3)
    return slurm.job(job_id)["JobState"]


def test_a_job_submitted_by_hand_trains_on_two_nodes_to_the_end(slurm, images, tmp_path):
    """As the README says, with GPUs that Slurm alone believes in. The site has pmix, and Horovod has MPI."""
    script = REPO / "slurm" / "train.sbatch"
    argv = [
        "sbatch",
        "--parsable",
        "--output=log",
        "--nodes=2",
        "--gpus-per-node=2",
        script,
        images,
        "--run-dir",
        "runs/first",
    ]
    job_id = slurm.run(*argv, *SMALL, *settings(max_steps=4), cwd=tmp_path).strip()
    log, run_dir = tmp_path / "log", tmp_path / "runs" / "first"
    assert end_of(slurm, job_id, log) == "COMPLETED", log.read_text()
    assert "2 nodes x 2 ranks, launcher pmix" in log.read_text() and "interface eth0" in log.read_text()
    assert "WARNING 2 ranks share 1 CPU on a node" in log.read_text()
    assert records(run_dir, "run")[0]["hosts"] == ["n1", "n1", "n2", "n2"]
    assert len(losses(run_dir)) == 4
    said = status(slurm, job_id)
    assert said.pop("images_per_s") > 0
    wanted = {"job_id": job_id, "state": "COMPLETED", "exit_code": 0, "restarts": 0, "step": 4}
    assert said == wanted | {"run_dir": str(run_dir)}
    forgotten = status(slurm, "999999", "--run-dir", str(run_dir))
    assert (forgotten["state"], forgotten["exit_code"], forgotten["step"]) == ("COMPLETED", 0, 4)


@pytest.fixture(scope="session")
def unbroken(slurm, images, tmp_path_factory) -> Path:
    """The run folder of a job that nothing disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    owt = ["--run-dir", "run", *settings(max_steps=STEPS, dropout=0.5)]
    job_id = submit(slurm, folder, images, "--nodes=2", "--launcher=gloo", owt=owt)
    assert end_of(slurm, job_id, folder / "log") == "COMPLETED", (folder / "log").read_text()
    return folder / "run"


def test_a_preempted_job_and_a_warned_one_resume_with_the_same_losses(slurm, images, unbroken, tmp_path):
    """An urgent job takes its nodes, then it is warned by hand. Its name would trap a careless script."""
    name = 'it\'s "$(touch broken)" `x` \\ #1'
    owt = ["--run-dir", "my run", *settings(max_steps=STEPS, dropout=0.5)]
    options = ["--nodes=2", "--launcher=gloo", "--job-name", name]
    job_id = submit(slurm, tmp_path, images, *options, owt=owt)
    log, run_dir = tmp_path / "log", tmp_path / "my run"
    assert f" JobName={name} " in slurm.run("scontrol", "-o", "show", "job", job_id).replace("\n", " ")
    wait_for(lambda: losses(run_dir), log=log)
    assert status(slurm, job_id)["state"] == "RUNNING"
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null"]
    urgent_id = slurm.run(*urgent, "--wrap=true", cwd=tmp_path).strip()
    assert end_of(slurm, urgent_id, log) == "COMPLETED"
    preempted_at = len(losses(run_dir))
    wait_for(lambda: len(losses(run_dir)) > preempted_at, log=log)
    slurm.run("scancel", "--batch", "--signal=USR1", job_id)
    assert end_of(slurm, job_id, log) == "COMPLETED", log.read_text()
    said = status(slurm, job_id)
    assert (said["restarts"], said["step"], said["run_dir"]) == (2, STEPS, str(run_dir))
    assert losses(run_dir) == losses(unbroken)
    assert 0 < preempted_at < STEPS and f"checkpoints/step-{preempted_at:08d}\n" in log.read_text()
    warned_at = json.loads((run_dir / "attempts.jsonl").read_text().splitlines()[-2])["last_step"]
    assert f"requeued, start 3 of 21, from step-{warned_at:08d}" in log.read_text()
    assert not (tmp_path / "broken").exists()


def test_a_job_whose_first_node_is_killed_continues_on_the_others(slurm, images, tmp_path):
    """Slurm misses the node after SlurmdTimeout, and starts the job again where it can. Here by Gloo."""
    owt = ["--run-dir", "run", *settings(max_steps=STEPS, checkpoint_every=2, stall_limit_s=20)]
    job_id = submit(slurm, tmp_path, images, "--nodes=2", "--launcher=gloo", owt=owt)
    log, run_dir = tmp_path / "log", tmp_path / "run"
    wait_for(lambda: len(losses(run_dir)) > 4, log=log)
    slurm.power_off("n1")
    killed_at = len(losses(run_dir))
    try:
        assert end_of(slurm, job_id, log) == "COMPLETED", log.read_text()
        assert [run["hosts"] for run in records(run_dir, "run")] == [["n1", "n2"], ["n2", "n3"]]
        assert killed_at < STEPS and losses(run_dir)[-1][0] == STEPS
        again = losses(run_dir)[killed_at][0]
        assert 1 < again <= killed_at + 1
        assert status(slurm, job_id)["restarts"] == 1
    finally:
        slurm.power_on("n1")
    wait_for(lambda: slurm.states() == ["idle"] * 3)


def test_an_elastic_job_continues_without_a_node_that_lost_power(slurm, images, tmp_path):
    """Nothing says goodbye: not the node's kernel to the ranks, nor to ssh, nor to Slurm."""
    options = ["--kind=elastic", "--nodes=3", "--ntasks-per-node=1"]
    owt = ["--run-dir", "run", *settings(epochs=1000, max_steps=30, commit_every=2, stall_limit_s=20)]
    job_id = submit(slurm, tmp_path, images, *options, owt=owt)
    log, run_dir = tmp_path / "log", tmp_path / "run"
    wait_for(lambda: len(losses(run_dir)) > 4, log=log)
    slurm.power_off("n2")
    try:
        assert end_of(slurm, job_id, log) == "COMPLETED", log.read_text()
    finally:
        slurm.power_on("n2")
    wait_for(lambda: slurm.states() == ["idle"] * 3)
    said = status(slurm, job_id)
    assert (said["restarts"], said["step"]) == (0, 30)
    worlds = [(sorted(run["hosts"]), run["first_step"]) for run in records(run_dir, "run")]
    assert [hosts for hosts, _ in worlds] == [["n1", "n2", "n3"], ["n1", "n3"]]
    (fault,) = (record for record in records(run_dir, "fault") if "a rank was lost" in record["fault"])
    assert worlds[1][1] % 2 == 0 and 0 <= fault["step"] - worlds[1][1] <= 2
    assert "lost nodes n2; remaining: n1, n3" in log.read_text()


def test_before_its_time_is_up_a_job_stops_at_a_checkpoint(slurm, images, tmp_path):
    """And is not requeued more often than it may be. By mpirun, which passes the warning on to all nodes."""
    options = ["--nodes=2", "--time=10", "--signal=B:USR1@50", "--max-restarts=0", "--launcher=mpirun"]
    job_id = submit(slurm, tmp_path, images, *options, owt=settings(epochs=1000000))
    log, run_dir = tmp_path / "log", tmp_path / "runs" / f"slurm-{job_id}"
    wait_for(lambda: losses(run_dir), log=log)
    # not sooner: Slurm looks every 30 s, and warns up to so much too early
    slurm.run("scontrol", "update", f"JobId={job_id}", "TimeLimit=1")
    assert end_of(slurm, job_id, log) == "FAILED"
    said = status(slurm, job_id)
    assert (said["exit_code"], said["restarts"], said["run_dir"]) == (75, 0, str(run_dir))
    assert f"step-{said['step']:08d}" in os.listdir(run_dir / "checkpoints")
    assert "not requeued: restart limit (0) reached" in log.read_text()


@pytest.mark.slow
def test_tasks_of_an_array_train_with_seeds_of_their_own(slurm, images, tmp_path):
    options = ["--array=3,5", "--nodes=1", "--exclusive", "--launcher=gloo"]
    job_id = submit(slurm, tmp_path, images, *options, owt=settings(max_steps=2, seed="{task}"))
    tasks = [f"{job_id}_3", f"{job_id}_5"]
    for task in tasks:
        assert end_of(slurm, task, tmp_path / "log") == "COMPLETED", (tmp_path / "log").read_text()
        config = json.loads((tmp_path / "runs" / f"slurm-{task}" / "config.json").read_text())
        assert f"{job_id}_{config['seed']}" == task
        assert (status(slurm, task)["job_id"], status(slurm, task)["step"]) == (task, 2)


def test_a_cancelled_job_has_a_checkpoint_and_does_not_come_back(slurm, images, tmp_path):
    job_id = submit(slurm, tmp_path, images, "--nodes=1", owt=["--run-dir", "run", *settings(epochs=1000000)])
    log, run_dir = tmp_path / "log", tmp_path / "run"
    wait_for(lambda: losses(run_dir), log=log)
    slurm.run(*OWT_JOB, "cancel", job_id)
    wait_for(lambda: (run_dir / "outcome.json").exists(), log=log)
    wait_for(lambda: slurm.states() == ["idle"] * 3, log=log)
    said = status(slurm, job_id)
    assert (said["state"], said["restarts"]) == ("CANCELLED", 0)
    assert f"step-{said['step']:08d}" in os.listdir(run_dir / "checkpoints")


@pytest.mark.slow
def test_a_run_asked_to_stop_ends_its_job_which_is_not_requeued(slurm, images, tmp_path):
    """Asked from a node that has no part in the job, by files alone."""
    owt = ["--run-dir", "run", *settings(epochs=1000000)]
    job_id = submit(slurm, tmp_path, images, "--nodes=2", "--launcher=gloo", owt=owt)
    log, run_dir = tmp_path / "log", tmp_path / "run"
    wait_for(lambda: losses(run_dir), log=log)
    slurm.run("owt", "save", run_dir, "--wait", host="n3")
    saved = len(losses(run_dir))
    slurm.run("owt", "stop", run_dir, "--wait", host="n3")
    assert end_of(slurm, job_id, log) == "FAILED", log.read_text()
    said = status(slurm, job_id)
    assert (said["exit_code"], said["restarts"]) == (75, 0)
    assert said["step"] >= saved and f"step-{said['step']:08d}" in os.listdir(run_dir / "checkpoints")
    assert "not requeued" in log.read_text() and not (run_dir / "STOP").exists()


def test_a_job_that_fails_at_once_stays_failed_and_a_waiting_one_is_cancelled(slurm, images, tmp_path):
    job_id = submit(slurm, tmp_path, images, "--nodes=1", owt=settings(lr="fast"))
    waiting = submit(slurm, tmp_path, images, "--nodes=1", f"--dependency=afterok:{job_id}")
    assert status(slurm, waiting)["state"] == "PENDING"
    assert end_of(slurm, job_id, tmp_path / "log") == "FAILED"
    said = status(slurm, job_id)
    assert (said["exit_code"], said["restarts"], said["step"]) == (2, 0, None)
    assert "lr=fast; wanted a number" in (tmp_path / "log").read_text()
    slurm.run(*OWT_JOB, "cancel", waiting)
    assert status(slurm, waiting)["state"] == "CANCELLED"


@pytest.mark.parametrize("command", ["hosts", pytest.param("mpirun", marks=pytest.mark.slow)])
def test_launched_jobs_reach_hosts_by_ssh(slurm, images, tmp_path, command):
    """Without Slurm; the hosts have nothing in common but a network and their files.

    The user's bash exports functions, and a variable of two lines.
    """
    (tmp_path / "hosts").write_text("n1:1\nn2:1\n")
    start = [VENV_BIN / "owt", "launch", command, "--hosts", "hosts", "--", images, "--run-dir", "run"]
    env = slurm.environment() | {"BASH_FUNC_module%%": "() {  eval `modulecmd $*`\n}", "TWO": "it's\ntwo"}
    train = [*start, *SMALL, *settings(max_steps=2)]
    slurm.run(*train, host="n1", cwd=tmp_path, limit_s=LIMIT_S, env=env)
    assert records(tmp_path / "run", "run")[0]["hosts"] == ["n1", "n2"]
    assert len(losses(tmp_path / "run")) == 2


@pytest.mark.slow
def test_an_elastic_job_outlives_one_of_its_hosts(slurm, images, tmp_path):
    """Two hosts that reach each other by ssh; when one has no power any more, the other goes on alone."""
    (tmp_path / "hosts").write_text("n1:1\nn2:1\n")
    owt = [images, "--run-dir", "run", *SMALL, *settings(max_steps=60, commit_every=2, stall_limit_s=20)]
    start = ["owt", "launch", "elastic", "--hosts", "hosts", "--", *owt]
    argv, run_dir, log = slurm.hosts["n1"].enter(*map(str, start)), tmp_path / "run", tmp_path / "log"
    with log.open("w") as said:
        job = subprocess.Popen(argv, env=slurm.environment(), cwd=tmp_path, stdout=said, stderr=said)
    try:
        wait_for(lambda: len(losses(run_dir)) > 4, log=log)
        slurm.power_off("n2")
        assert job.wait(LIMIT_S) == 0, log.read_text()[-6000:]
    finally:
        job.kill()
        slurm.power_on("n2")
    first, second = records(run_dir, "run")
    assert (sorted(first["hosts"]), second["hosts"]) == (["n1", "n2"], ["n1"])  # rank 0 may be on either
    *stalls, fault = records(
        run_dir, "fault"
    )  # a stall is reported where its time comes before the regrouping
    assert "a rank was lost" in fault["fault"] and all("on n2" in stall["fault"] for stall in stalls)
    assert second["first_step"] % 2 == 0 and 0 <= fault["step"] - second["first_step"] <= 2
    assert sorted(dict(losses(run_dir))) == list(range(1, 61))
    wait_for(lambda: slurm.states() == ["idle"] * 3)


def test_a_script_outside_a_job_reports_what_it_needs(slurm, tmp_path):
    script = REPO / "slurm" / "train.sbatch"
    done = slurm.run("sh", "-c", f"{script.as_posix()!r} D 2>&1 || true", cwd=tmp_path)
    assert re.search("no SLURM_JOB_NODELIST in the environment; wanted a Slurm job", done)
