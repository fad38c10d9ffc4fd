"""What the supervisor makes of a run's end."""

import ctypes
import errno
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from horovod_owt.errors import ConfigError
from horovod_owt.launch import supervisor
from horovod_owt.launch.supervisor import reason_not_to_restart
from horovod_owt.runs.attempts import (
    JOB,
    Attempt,
    AttemptWatch,
    append_attempt,
    earlier_attempts,
    next_start,
    run_dir_of,
    scheduler_job_id,
)
from horovod_owt.runs.records import MetricsLog, Start, newest_records, time_of


def attempt(exit_code=1, last_step=5, new_checkpoint=False, asked_to_stop=False) -> Attempt:
    return Attempt(exit_code, "lost contact", last_step, "", new_checkpoint, asked_to_stop)


@pytest.mark.parametrize(
    ("attempts", "why"),
    [
        ([attempt()], ""),
        ([attempt(exit_code=0)], "done"),
        ([attempt(exit_code=2)], "configuration"),
        ([attempt(exit_code=75)], "stopped by a signal"),
        ([attempt(exit_code=1, asked_to_stop=True)], "stopped by a signal"),
        ([attempt(last_step=0)], "before the first step"),
        ([attempt(last_step=5), attempt(last_step=0)], ""),
        ([attempt(last_step=n) for n in (5, 0, 0)], "before the first step"),
        ([attempt(last_step=5), attempt(last_step=5)], "failed twice after step 5"),
        ([attempt(last_step=5), attempt(last_step=5, new_checkpoint=True)], ""),
        ([attempt(last_step=5), attempt(last_step=4)], ""),
        ([attempt(last_step=n) for n in (5, 6, 7)], ""),
        ([attempt(last_step=n) for n in (5, 6, 7, 8)], "restart limit (3) reached"),
    ],
)
def test_a_job_is_started_again_only_where_that_may_help(attempts, why):
    said = reason_not_to_restart(attempts, max_restarts=3)
    assert why in said and bool(why) == bool(said)


@pytest.mark.parametrize(
    ("attempts", "restarts", "why"),
    [
        ([attempt(exit_code=75)], 0, ""),
        ([attempt(exit_code=75, last_step=0)], 2, ""),
        ([attempt(exit_code=138, last_step=0, asked_to_stop=True)], 0, ""),
        ([attempt(exit_code=75, last_step=n) for n in (5, 0)], 1, ""),
        ([attempt(exit_code=75, last_step=0)] * 2, 1, "stopped twice before a step"),
        ([attempt(exit_code=75)], 3, "limit (3) reached"),
        ([attempt()], 3, "limit (3) reached"),
        ([attempt(last_step=0)], 0, "before the first step"),
    ],
)
def test_a_queue_that_stops_a_job_starts_it_again_but_not_for_ever(attempts, restarts, why):
    """Slurm counts the restarts: a start that it cut off left no attempt."""
    said = reason_not_to_restart(attempts, max_restarts=3, restarts=restarts, stop_is_final=False)
    assert why in said and bool(why) == bool(said)


def test_the_run_folder_is_found_in_the_command_and_wanted_there():
    assert run_dir_of(["horovodrun", "owt", "train", "D", "--run-dir", "runs/a"]).name == "a"
    assert run_dir_of(["owt", "train", "D", "--run-dir=runs/b"]).name == "b"
    twice = ["owt", "train", "D", "--run-dir", "runs/a", "--run-dir", "runs/b"]  # a script's, and the user's
    assert run_dir_of(twice).name == "b"
    home = ["owt", "train", "D", "--run-dir=~/runs/c"]  # which no shell expands
    assert run_dir_of(home) == Path.home() / "runs" / "c"
    without = ([], ["--run-dir"], ["--run-dir", ""], ["--run-dir=", "--set", "batch=2"])
    for command in (["owt", "train", "D", *words] for words in without):
        with pytest.raises(ConfigError, match="no --run-dir"):
            run_dir_of(command)


def test_an_attempt_is_judged_by_what_it_wrote_itself(tmp_path):
    def step(number):
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"kind": "step", "step": number, "loss": 1.0}) + "\n")

    def outcome(**values):
        (tmp_path / "beside").write_text(json.dumps(values))
        (tmp_path / "beside").rename(tmp_path / "outcome.json")

    step(7)
    outcome(exit_code=75, reason="stopped by SIGTERM")
    (tmp_path / "checkpoints" / "step-00000007").mkdir(parents=True)
    folder = AttemptWatch(tmp_path)
    silent = folder.attempt(-9, asked_to_stop=False)
    assert (silent.exit_code, silent.last_step, silent.new_checkpoint) == (137, 0, False)
    assert "SIGKILL" in silent.reason and silent.checkpoint == "step-00000007"

    step(8)
    step(9)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "ste')  # cut short by a kill
    outcome(exit_code=2, reason="no such recipe")
    (tmp_path / "checkpoints" / "step-00000009").mkdir()
    hidden = folder.attempt(1, asked_to_stop=False)
    assert (hidden.exit_code, hidden.reason, hidden.last_step) == (2, "no such recipe", 9)
    assert hidden.new_checkpoint and hidden.checkpoint == "step-00000009"

    folder = AttemptWatch(tmp_path)
    assert not folder.attempt(1, asked_to_stop=False).new_checkpoint
    (tmp_path / "checkpoints" / "step-00000009").rename(tmp_path / "damaged")
    (tmp_path / "checkpoints" / "step-00000009").mkdir()
    assert folder.attempt(1, asked_to_stop=False).new_checkpoint  # of the same step, made again

    outcome(exit_code=0, reason="done")
    assert folder.attempt(0, asked_to_stop=False).exit_code == 0
    assert folder.attempt(1, asked_to_stop=False).exit_code == 1


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_file_server_that_does_not_answer_for_a_moment_does_not_end_the_supervisor(
    tmp_path, monkeypatch, number
):
    """Which asks it every second whether the run has ended; the job would go on without it."""
    outcome, real_stat = tmp_path / "outcome.json", Path.stat
    outcome.write_text('{"exit_code": 75, "reason": "of an earlier start"}')
    watch = AttemptWatch(tmp_path)

    def no_answer(self, **options):
        if self == outcome:
            raise OSError(number, os.strerror(number), str(self))
        return real_stat(self, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", no_answer)
        assert not watch.has_ended()
        assert watch.attempt(1, asked_to_stop=False).reason == "launcher exit code 1"
    outcome.unlink()  # as while it is replaced on SMB
    assert not watch.has_ended()
    outcome.write_text('{"exit_code": 1, "reason": "of this one"}')
    assert watch.has_ended() and watch.attempt(1, asked_to_stop=False).reason == "of this one"


def test_each_start_of_a_job_has_its_name_and_another_job_another(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor.Supervisor, "_set_up_process", lambda self: None)
    monkeypatch.setattr(supervisor, "GRACE_S", 0.0)
    monkeypatch.delenv(JOB, raising=False)
    step = json.dumps({"kind": "step", "step": 1})
    script = f"echo ${JOB} >>$1/names; echo '{step}' >>$1/metrics.jsonl; exit 1"
    command = ["sh", "-c", script, "job", str(tmp_path), "--run-dir", str(tmp_path)]
    for name in (None, None, "slurm-7"):
        if name:
            monkeypatch.setenv(JOB, name)
        supervisor.Supervisor(command, max_restarts=3).run()  # twice, as it comes no further
    first, again, second, _, third, _ = (tmp_path / "names").read_text().splitlines()
    assert first == again and first and second not in ("", first) and third == "slurm-7"


def test_a_launcher_that_outlives_the_runs_last_word_is_ended_with_all_below_it(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "OUTCOME_GRACE_S", 0.5)
    monkeypatch.setattr(supervisor, "GRACE_S", 0.1)
    word = json.dumps({"exit_code": 2, "reason": "stalled"})
    script = f"echo '{word}' > $1/outcome.json; sleep 1000 & echo $! > $1/pid; wait"
    before = {number: signal.getsignal(number) for number in supervisor.FORWARDED}
    try:
        command = ["sh", "-c", script, "job", str(tmp_path), "--run-dir", str(tmp_path)]
        assert supervisor.Supervisor(command, max_restarts=3).run() == 2
    finally:
        ctypes.CDLL(None).prctl(supervisor.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("number", ["HUP", "INT"])  # under nohup; by `&` in a script
def test_a_terminal_does_not_stop_a_job_that_was_started_to_ignore_it(tmp_path, number):
    before = {number: signal.getsignal(number) for number in supervisor.FORWARDED}
    signal.signal(getattr(signal, f"SIG{number}"), signal.SIG_IGN)
    try:
        command = ["sh", "-c", f"kill -{number} $PPID; exit 3", "job", "--run-dir", str(tmp_path)]
        attempt = supervisor.Supervisor(command).run_once()
    finally:
        ctypes.CDLL(None).prctl(supervisor.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (attempt.exit_code, attempt.asked_to_stop) == (3, False)


def test_a_signal_finds_the_ranks_in_a_shell_of_srun_too(monkeypatch):
    """With an MPI by default, each process below `srun --pty` looks like rank 0 of 1, the launcher too."""
    monkeypatch.setenv("PMIX_RANK", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    with subprocess.Popen(["sh", "-c", "HOROVOD_RANK=0 HOROVOD_SIZE=2 sleep 60; true"]) as launcher:
        try:
            rank, end = [], time.monotonic() + 20
            while not rank and time.monotonic() < end:
                below = psutil.Process(launcher.pid).children()
                rank = [process for process in below if "HOROVOD_RANK" in process.environ()]
            assert [process.pid for process in supervisor.ranks_here()] == [rank[0].pid]
        finally:
            supervisor.kill_descendants(0)


def test_a_damaged_record_of_an_attempt_is_passed_over(tmp_path, caplog):
    for number in (1, 2):
        append_attempt(tmp_path, attempt(last_step=number), start=Start(number, "7"), restarts=number)
        with (tmp_path / "attempts.jsonl").open("a") as file:
            file.write('"job_id": 7\n{"job_id": "7"}\n{"job_')  # and half a line, which the next one cuts off
    assert [each.last_step for each in earlier_attempts(tmp_path, "7")] == [1, 2]
    assert earlier_attempts(tmp_path, "8") == []
    assert "attempts.jsonl: damaged line skipped" in caplog.text


@pytest.mark.parametrize("damage", ["{half", "[]", "{}", '{"exit_code": "one"}', ""])
def test_where_the_outcome_is_damaged_the_launchers_word_counts(tmp_path, damage):
    watch = AttemptWatch(tmp_path)
    (tmp_path / "outcome.json").write_text(damage)
    last = watch.attempt(3, asked_to_stop=False)
    assert last.exit_code == 3 and str(tmp_path / "outcome.json") in last.reason


@pytest.mark.parametrize(("script", "said"), [("exit 0", ""), ("exit 3", "not restarted: ")])
def test_only_a_job_that_failed_is_commented_on(monkeypatch, capfd, tmp_path, script, said):
    monkeypatch.setattr(supervisor.Supervisor, "_set_up_process", lambda self: None)
    supervisor.Supervisor(["sh", "-c", script, "job", "--run-dir", str(tmp_path)]).run()
    errors = capfd.readouterr().err
    assert said in errors and bool(errors) == bool(said)


def test_attempts_have_one_number_in_all_records_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for number, (in_batch, records) in enumerate([(1, 1), (1, 0), (0, 1), (1, 0), (1, 1)], start=1):
        watch, start = AttemptWatch(tmp_path), next_start(tmp_path, os.environ)
        assert start == watch.start == Start(number, "7")
        if records:
            metrics = MetricsLog(tmp_path, start)
            metrics.write("run")
            metrics.close()
        if in_batch:
            append_attempt(tmp_path, attempt(), start=watch.start, restarts=0)
    found = list(newest_records(tmp_path / "attempts.jsonl"))
    assert [record["attempt"] for record in found] == [5, 4, 2, 1]
    assert found[0]["job_id"] == "7" and time_of(found[0]) == pytest.approx(time.time(), abs=60)


@pytest.mark.parametrize(
    ("env", "job_id"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "12"}, "12"),
        ({"SLURM_JOB_ID": "13", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "1"}, "12_1"),
        ({"PBS_JOBID": "12.server"}, "12.server"),
        ({"LSB_JOBID": "12"}, "12"),
    ],
)
def test_the_job_id_is_the_schedulers(env, job_id):
    assert scheduler_job_id(env) == job_id


def test_the_supervisor_records_each_attempt(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor.Supervisor, "_set_up_process", lambda self: None)
    monkeypatch.setattr(supervisor, "GRACE_S", 0.0)
    script = """
        done=$(cat "$1/metrics.jsonl" 2>/dev/null | wc -l)
        echo '{"kind": "step", "step": '$((done + 1))'}' >>"$1/metrics.jsonl"
        exit 1
    """
    command = ["sh", "-c", script, "job", str(tmp_path), "--run-dir", str(tmp_path)]
    supervisor.Supervisor(command, max_restarts=2).run()
    found = list(newest_records(tmp_path / "attempts.jsonl"))[::-1]
    assert [(one["attempt"], one["restarts"], one["last_step"]) for one in found] == [
        (1, 0, 1),
        (2, 1, 2),
        (3, 2, 3),
    ]
    assert all(one["exit_code"] == 1 and one["time"] for one in found)
