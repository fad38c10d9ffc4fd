"""Requests to a run as files: who sees, obeys and removes them, and the commands that make them."""

import json
import os
import socket
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from horovod_owt.cli import cli
from horovod_owt.config import TrainConfig
from horovod_owt.errors import ConfigError, RunError
from horovod_owt.launch.supervisor import reason_not_to_restart
from horovod_owt.runs import control
from horovod_owt.runs.attempts import AttemptWatch, append_attempt, earlier_attempts
from horovod_owt.runs.control import (
    SAVE,
    STOP,
    pending_requests,
    send_request,
    wait_for_checkpoint,
    wait_for_end,
)
from horovod_owt.runs.folder import write_outcome
from horovod_owt.runs.opening import Resume, open_run_folder
from horovod_owt.runs.owner import Ownership, active_owner, this_process
from horovod_owt.runs.records import MetricsLog, Start
from horovod_owt.train import requests as train_requests
from horovod_owt.train.requests import FileRequests
from horovod_owt.train.stop import StopRequest

DATA = {"train_images": 1, "val_images": 1, "classes": ["a"], "fingerprint": "x"}


@pytest.fixture
def run_dir(tmp_path):
    """A folder that this process owns."""
    with Ownership() as ownership:
        ownership.take(tmp_path)
        yield tmp_path


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(control, "POLL_S", 0.01)
    monkeypatch.setattr(train_requests, "CHECK_S", 0.01)


def until(condition, limit_s=30):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def owner_elsewhere(run_dir: Path, seen_s_ago: float) -> None:
    """The folder's owner is a process of another host."""
    (run_dir / "owner").mkdir(exist_ok=True)
    file = run_dir / "owner" / "00000007.json"
    file.write_text(json.dumps(asdict(replace(this_process({}), host="node9", kernel="another"))))
    then = time.time() - seen_s_ago
    os.utime(file, (then, then))


def test_the_owner_is_found_while_it_owns_the_folder(tmp_path):
    assert active_owner(tmp_path) is None
    with Ownership() as ownership:
        ownership.take(tmp_path)
        assert active_owner(tmp_path).pid == os.getpid()
    assert active_owner(tmp_path) is None


@pytest.mark.parametrize(("seen_s_ago", "alive"), [(3, True), (60, False)])
@pytest.mark.parametrize("clock_off_s", [0, 600, -600])
def test_an_owner_on_another_host_is_alive_as_long_as_it_renews_its_file(
    tmp_path, monkeypatch, seen_s_ago, alive, clock_off_s
):
    """By the file server's clock, whatever this host's says."""
    owner_elsewhere(tmp_path, seen_s_ago)
    now = time.time() + clock_off_s
    monkeypatch.setattr(time, "time", lambda: now)
    assert (active_owner(tmp_path) is not None) == alive


def test_an_owner_of_this_host_that_has_ended_is_none(tmp_path):
    (tmp_path / "owner").mkdir()
    gone = replace(this_process({}), start_ticks=1)  # its PID is in use again
    (tmp_path / "owner" / "00000001.json").write_text(json.dumps(asdict(gone)))
    assert active_owner(tmp_path) is None


def test_a_file_stop_is_seen_once_and_kept_until_the_end(run_dir, caplog):
    caplog.set_level("INFO")
    stop = StopRequest()
    with FileRequests(run_dir, stop) as files:
        assert not stop.asked
        send_request(run_dir, STOP)
        until(lambda: stop.asked)
        assert stop.by == STOP and stop.signal is None and (run_dir / STOP).exists()
        time.sleep(0.05)
    assert caplog.messages == [f"{run_dir / STOP}: stopping at a checkpoint"]
    files.withdraw_all()
    assert pending_requests(run_dir) == set()


def test_a_file_save_is_removed_when_its_checkpoint_is_on_disk(run_dir):
    stop = StopRequest()
    with FileRequests(run_dir, stop) as files:
        files.saving(3)  # of the run's own accord
        files.saved(3)
        send_request(run_dir, SAVE)
        until(lambda: files.save_asked)
        files.saving(7)
        files.saved(6)  # another one, begun before
        time.sleep(0.05)
        assert not files.save_asked and (run_dir / SAVE).exists()  # asked once
        files.saved(7)
        assert not (run_dir / SAVE).exists() and not stop.asked
        send_request(run_dir, SAVE)
        until(lambda: files.save_asked)


def test_a_save_that_the_disk_refuses_is_obeyed_by_the_next_checkpoint(run_dir):
    with FileRequests(run_dir, StopRequest()) as files:
        send_request(run_dir, SAVE)
        until(lambda: files.save_asked)
        files.saving(7)
        files.saving(20)  # nothing was written after step 7
        files.saved(20)
        assert not (run_dir / SAVE).exists()


def test_a_lost_folder_is_looked_for_again(tmp_path):
    run_dir = tmp_path / "run"
    stop = StopRequest()
    with FileRequests(run_dir, stop):
        time.sleep(0.05)
        run_dir.mkdir()
        (run_dir / STOP).touch()
        until(lambda: stop.asked)


def test_a_start_removes_older_requests_and_obeys_newer_ones(tmp_path, caplog):
    (tmp_path / STOP).touch()
    os.utime(tmp_path / STOP, (1e9, 1e9))
    with Ownership() as ownership:
        open_run_folder(tmp_path, TrainConfig(classes=1), DATA, Resume(), ownership)
        assert pending_requests(tmp_path) == set()
        assert f"{tmp_path / STOP} is from before this start: removed" in caplog.text
        send_request(tmp_path, STOP)
        assert pending_requests(tmp_path) == {STOP}


@pytest.mark.parametrize("command", ["stop", "save"])
def test_where_nothing_runs_a_request_is_an_error_of_one_line(tmp_path, command):
    error = CliRunner().invoke(cli, [command, str(tmp_path)]).exception
    assert isinstance(error, ConfigError)
    assert str(error).startswith(f"no run is active in {tmp_path}; wanted an active run; fix: ")
    error = CliRunner().invoke(cli, [command, str(tmp_path / "none")]).exception
    assert str(error) == f"{tmp_path}/none does not exist; wanted the --run-dir of an active run"
    assert pending_requests(tmp_path) == set()


@pytest.mark.parametrize(("command", "file"), [("stop", STOP), ("save", SAVE)])
def test_the_commands_make_the_files(run_dir, command, file):
    done = CliRunner().invoke(cli, [command, str(run_dir)])
    assert done.exit_code == 0 and pending_requests(run_dir) == {file}
    assert f"process {os.getpid()} on {socket.gethostname()}" in done.output


def test_a_folder_of_somebody_else_is_an_error_of_one_line(run_dir, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(ConfigError, match=f"{run_dir}/STOP: Permission denied; wanted "):
        send_request(run_dir, STOP)


def test_waiting_for_the_end_tells_how_it_ended(tmp_path):
    ownership = Ownership()
    ownership.take(tmp_path)
    owner = send_request(tmp_path, STOP)
    with pytest.raises(RunError, match="is still in use by process .* after 0.05 s; fix: "):
        wait_for_end(tmp_path, owner, 0.05)
    write_outcome(tmp_path, {"exit_code": 75, "reason": "stopped by the file STOP after step 7"})
    ownership.leave()
    assert wait_for_end(tmp_path, owner, 10) == "stopped by the file STOP after step 7"


def test_the_outcome_of_an_earlier_attempt_is_not_that_of_a_killed_one(tmp_path):
    first, second = Start(attempt=1), Start(attempt=2)
    write_outcome(tmp_path, {**first.stamp(), "exit_code": 75, "reason": "stopped by the file STOP"})
    for start in (first, second):
        log = MetricsLog(tmp_path, start)
        log.write("run", first_step=0)
        log.close()
    gone = replace(this_process({}), pid=1)
    assert "without an outcome" in wait_for_end(tmp_path, gone, 10)
    write_outcome(tmp_path, {**second.stamp(), "exit_code": 0, "reason": "done"})
    assert wait_for_end(tmp_path, gone, 10) == "done"


def test_an_elastic_job_that_regroups_has_not_ended(tmp_path, monkeypatch):
    """Rank 0's host is lost: the next owner comes later, and belongs to the same driver."""
    lost = replace(this_process({}), pid=1, driver="node1:4711")
    owners = [lost, None, None, replace(lost, pid=2), replace(lost, pid=2), None]

    def next_owner(run_dir: Path):
        owner = owners.pop(0)
        if not owners:
            write_outcome(run_dir, {"exit_code": 75, "reason": "stopped by the file STOP after step 9"})
        return owner

    monkeypatch.setattr(control, "active_owner", next_owner)
    assert wait_for_end(tmp_path, lost, 30) == "stopped by the file STOP after step 9"


def test_an_elastic_job_whose_last_rank_is_lost_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(control, "REGROUP_S", 0.05)
    lost = replace(this_process({}), pid=1, driver="node1:4711")
    assert "without an outcome" in wait_for_end(tmp_path, lost, 30)


def test_waiting_for_a_checkpoint_names_it(tmp_path):
    ownership = Ownership()
    ownership.take(tmp_path)
    owner = send_request(tmp_path, SAVE)
    with pytest.raises(RunError, match="no new checkpoint yet after 0.05 s"):
        wait_for_checkpoint(tmp_path, owner, 0.05)
    for step in (7, 20):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    (tmp_path / SAVE).unlink()
    assert wait_for_checkpoint(tmp_path, owner, 10).name == "step-00000020"
    send_request(tmp_path, SAVE)
    ownership.leave()
    with pytest.raises(RunError, match="has ended without writing a checkpoint"):
        wait_for_checkpoint(tmp_path, owner, 10)


@pytest.mark.parametrize(("attempt", "exit_code", "saved"), [(2, 1, False), (2, 75, True), (1, 1, True)])
def test_a_run_that_failed_has_not_saved(tmp_path, attempt, exit_code, saved):
    """It withdraws the request at its end; an outcome of an earlier attempt says nothing."""
    log = MetricsLog(tmp_path, Start(attempt=2))
    log.write("run", first_step=0)
    log.close()
    (tmp_path / "checkpoints" / "step-00000007").mkdir(parents=True)
    write_outcome(tmp_path, {**Start(attempt).stamp(), "exit_code": exit_code, "reason": "loss is nan"})
    owner = this_process({})
    if saved:
        assert wait_for_checkpoint(tmp_path, owner, 10).name == "step-00000007"
    else:
        with pytest.raises(RunError, match="has ended without writing a checkpoint; fix: see outcome.json"):
            wait_for_checkpoint(tmp_path, owner, 10)


@pytest.mark.parametrize("stop_is_final", [True, False])
def test_a_deliberate_stop_is_neither_restarted_nor_requeued(tmp_path, stop_is_final):
    watch = AttemptWatch(tmp_path)
    write_outcome(tmp_path, {"exit_code": 75, "reason": "stopped by the file STOP", "stopped_by": STOP})
    last = watch.attempt(75, asked_to_stop=False)
    why = reason_not_to_restart([last], 10, restarts=0, stop_is_final=stop_is_final)
    assert why == "stopped by `owt stop`; the same command resumes"
    by_signal = replace(last, stopped_by="SIGUSR1")
    assert (
        bool(reason_not_to_restart([by_signal], 10, restarts=0, stop_is_final=stop_is_final)) == stop_is_final
    )


def test_attempts_recorded_by_an_older_version_are_read(tmp_path):
    attempt = AttemptWatch(tmp_path).attempt(1, asked_to_stop=False)
    append_attempt(tmp_path, attempt, start=Start(1, "7"), restarts=0)
    record = json.loads((tmp_path / "attempts.jsonl").read_text())
    for key in ("time", "attempt", "stopped_by"):
        del record[key]
    (tmp_path / "attempts.jsonl").write_text(json.dumps(record) + "\n")
    assert earlier_attempts(tmp_path, "7") == [attempt]


@pytest.mark.parametrize("limit", ["nan", "0", "-1"])
def test_a_time_limit_is_a_number_of_seconds(run_dir, limit):
    assert CliRunner().invoke(cli, ["stop", str(run_dir), "--time-limit", limit]).exit_code == 2
