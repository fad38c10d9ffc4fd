"""What Slurm's records and a run folder say of a job, and what follows from them."""

import json
import os
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner

from horovod_owt.cli import cli
from horovod_owt.errors import ConfigError, RunError
from horovod_owt.runs.records import last_step
from horovod_owt.slurm import batch, client, nodes, status
from horovod_owt.slurm.commands import parse_jobs

RECORD = """\
JobId={id}{array} JobName=x JobState=COMPLETED
   UserId=me(1) GroupId=me(1) MCS_label=N/A
   Priority=1 Nice=0 Account=(null) QOS=(null)
   JobState={state} Reason=None Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode={code}
   RunTime=00:00:00 TimeLimit=UNLIMITED TimeMin=N/A
   ReqNodeList=(null) ExcNodeList=(null)
   NodeList=n[1,3]
   Comment={{"run_dir": "/runs/a b"}}{space}
   Power=
"""


@pytest.mark.parametrize(
    ("state", "code", "exit_code"),
    [
        ("RUNNING", "0:0", None),
        ("COMPLETED", "0:0", 0),
        ("FAILED", "75:0", 75),
        ("CANCELLED", "0:15", 143),
        ("CANCELLED", "0:0", None),  # while it waited
        ("TIMEOUT", "0:0", None),
    ],
)
def test_a_job_record_is_read_whatever_the_job_is_called(state, code, exit_code):
    (job,) = parse_jobs(RECORD.format(id=7, array="", state=state, code=code, space=" ") + "   \n\n")
    assert (job.job_id, job.state, job.exit_code, job.restarts) == ("7", state, exit_code, 2)
    assert job.nodes == "n[1,3]"
    assert json.loads(job.comment) == {"run_dir": "/runs/a b"}


@pytest.mark.parametrize("state", ["PREEMPTED", "NODE_FAIL"])
def test_a_job_that_slurm_requeues_has_not_ended(state):
    text = RECORD.format(id=7, array="", state=state, code="0:15", space="")
    (job,) = parse_jobs(text)
    assert (job.state, job.exit_code) == ("REQUEUED", None)
    (job,) = parse_jobs(text.replace("Requeue=1", "Requeue=0"))
    assert (job.state, job.exit_code) == (state, 143)


@pytest.mark.parametrize("none", ["", "(null)", "None assigned", "None"])
def test_a_job_that_waits_for_nodes_has_none(monkeypatch, none):
    """Of one that lost its node and was requeued, too."""
    text = RECORD.format(id=7, array="", state="PENDING", code="0:0", space="")
    monkeypatch.setattr(client, "ask", lambda argv: text.replace("n[1,3]", none))
    done = CliRunner().invoke(cli, ["job", "nodes", "7"], catch_exceptions=False)
    assert (done.exit_code, done.output) == (0, "")


@pytest.mark.parametrize(
    "said",
    [
        "echo 'slurm_load_jobs error: Invalid job id specified' >&2",
        "echo 'Job 7_9 not found'",  # while Slurm knows other tasks of the array
    ],
)
def test_a_job_that_slurm_has_forgotten_is_known_by_its_run_folder(tmp_path, monkeypatch, said):
    tool = tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\n{said}\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    (tmp_path / "outcome.json").write_text('{"exit_code": 0}')
    assert status.job_status("7_9", tmp_path).state == "COMPLETED"
    with pytest.raises(ConfigError, match="unknown to Slurm, or ended too long ago"):
        status.job_status("7_9")
    with pytest.raises(RunError, match="Slurm has no record of job 7_9"):
        client.find_job("7_9")


@pytest.mark.parametrize(("number", "left"), [("9", True), ("12", False)])
def test_a_job_does_not_take_the_task_that_submitted_it_for_itself(monkeypatch, number, left):
    """A plain sbatch passes on the array variables of the job that it runs in."""
    record = RECORD.format(id=9, array=" ArrayJobId=7 ArrayTaskId=2", state="RUNNING", code="0:0", space="")
    monkeypatch.setattr(client, "ask", lambda argv: record)
    env = {"SLURM_JOB_ID": number, "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    batch.forget_array_of_submitter(env)
    assert ("SLURM_ARRAY_JOB_ID" in env) == ("SLURM_ARRAY_TASK_ID" in env) == left
    assert env["SLURM_JOB_ID"] == number


def test_a_job_without_a_record_of_its_own_trains_and_says_so(monkeypatch, capfd):
    """That costs it the comment for `owt job status`, and the requeue."""
    monkeypatch.setattr(client, "find_jobs", lambda job_id: [])
    batch.leave_run_dir("7_9", Path("/runs/a"))
    try:
        batch.requeue("7_9", "start 2 of 21")
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    said = capfd.readouterr().err
    assert "cannot set the job's comment: Slurm has no record of job 7_9" in said
    assert "requeue failed: Slurm has no record of job 7_9" in said


def test_components_of_a_heterogeneous_job_are_named_as_squeue_does(monkeypatch):
    components = [
        RECORD.format(id=7 + n, array=f" HetJobId=7 HetJobOffset={n}", state="RUNNING", code="0:0", space="")
        for n in (0, 1)
    ]
    monkeypatch.setattr(client, "ask", lambda argv: "\n".join(components))
    with pytest.raises(
        ConfigError, match=r"job 7 is heterogeneous: 7\+0 RUNNING, 7\+1 RUNNING; wanted one of"
    ):
        status.job_status("7")


def test_tasks_of_an_array_get_different_run_folders():
    tasks = [
        RECORD.format(id=7 + n, array=f" ArrayJobId=7 ArrayTaskId={n}", state="RUNNING", code="0:0", space="")
        for n in (1, 0)
    ]
    assert [job.job_id for job in parse_jobs("\n".join(tasks))] == ["7_1", "7_0"]


def test_the_nodes_of_a_job_are_those_that_it_has_now(monkeypatch):
    answers = {
        "show job": RECORD.format(id=7, array="", state="RUNNING", code="0:0", space=""),
        "hostnames n[1,3]": "n1\nn3\n",
    }

    def ask(argv: list[str]) -> str:
        return next(said for words, said in answers.items() if words in " ".join(argv))

    monkeypatch.setattr(nodes, "ask", ask)
    monkeypatch.setattr(client, "ask", ask)
    done = CliRunner().invoke(cli, ["job", "nodes", "7"], catch_exceptions=False)
    assert done.stdout == "n1\nn3\n"


def test_the_last_step_is_found_in_a_long_log_with_half_a_line_at_its_end(tmp_path):
    assert last_step(tmp_path) == (None, None)
    lines = [json.dumps({"kind": "step", "step": n, "images_per_s": n / 2}) for n in range(1, 5001)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"kind": "validation"}', '{"kind": "st']))
    assert last_step(tmp_path) == (5000, 2500.0)


def test_the_status_of_an_ended_job_comes_from_its_run_folder_damaged_or_not(tmp_path, monkeypatch):
    monkeypatch.setattr(status, "find_jobs", lambda job_id: [])
    (tmp_path / "outcome.json").write_text('{"exit_code": 75}')
    for name in ("metrics.jsonl", "attempts.jsonl"):  # after a power cut
        (tmp_path / name).write_text('{"kind": "step", "step": 3, "restarts": 2}\n\0\0\0\0\n')
    found = status.job_status("7", tmp_path)
    assert (found.state, found.step, found.restarts) == ("PREEMPTED", 3, 2)
    (tmp_path / "outcome.json").write_text('{"exit_code": 7')
    with pytest.raises(ConfigError, match="outcome.json is unreadable"):
        status.job_status("7", tmp_path)
