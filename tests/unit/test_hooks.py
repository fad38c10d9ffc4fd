"""The user's command on events: what it gets, and that nothing it does harms the run."""

import json
import logging
import sys
import time
from pathlib import Path

import psutil
import pytest

from horovod_owt.config import TrainConfig
from horovod_owt.errors import ConfigError
from horovod_owt.runs.records import Start
from horovod_owt.train import hooks
from horovod_owt.train.hooks import Hook, check_hook, without_launcher
from horovod_owt.train.journal import Journal
from horovod_owt.train.stop import StopRequest

CHECKPOINT = {"kind": "checkpoint", "step": 7}


def script(folder: Path, body: str) -> list[str]:
    file = folder / "hook"
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    return [str(file)]


def test_it_gets_event_and_folder_as_arguments_and_the_record_on_stdin(tmp_path):
    words = script(tmp_path, f'printf "%s|" "$@" >>{tmp_path}/seen; cat >>{tmp_path}/seen')
    hook = Hook([*words, "a b", "$HOME;*"], tmp_path, 30)
    for kind in ("step", "checkpoint", "fault", "validation", "outcome"):
        hook.tell({"kind": kind, "step": 7})
    hook.close()
    lines = (tmp_path / "seen").read_text().splitlines()
    assert len(lines) == 3
    for line, (event, kind) in zip(
        lines, [("checkpoint", "checkpoint"), ("fault", "fault"), ("end", "outcome")], strict=True
    ):
        *arguments, record = line.split("|")
        assert arguments == ["a b", "$HOME;*", event, str(tmp_path)]  # no shell
        assert json.loads(record) == {"kind": kind, "step": 7}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("echo so; echo no >&2; exit 3", "exit code 3: no"),
        ("kill -9 $$", "exit code -9"),
        ("exec sleep 100", "killed after 0.5 s"),
        ("sleep 100 & sleep 100", "killed after 0.5 s"),
        ("yes no | head -c 9999999; exit 1", "exit code 1: no"),
    ],
)
def test_a_failure_is_a_warning_and_the_next_event_is_told(tmp_path, caplog, body, says):
    words = script(tmp_path, f"echo $1 >>{tmp_path}/seen; case $1 in checkpoint) {body};; esac")
    hook = Hook(words, tmp_path, 0.5 if "sleep" in body else 30)
    hook.tell(CHECKPOINT)
    hook.tell({"kind": "outcome"})
    hook.close()
    assert [record.getMessage() for record in caplog.records] == [f"hook {words[0]} checkpoint: {says}"]
    assert (tmp_path / "seen").read_text().split() == ["checkpoint", "end"]
    assert not [child for child in psutil.Process().children(recursive=True) if "sleep" in child.name()]


def test_a_program_that_has_vanished_is_a_warning(tmp_path, caplog):
    hook = Hook([str(tmp_path / "gone")], tmp_path, 5)
    hook.tell(CHECKPOINT)
    hook.close()
    assert "No such file or directory" in caplog.text and caplog.records[0].levelno == logging.WARNING


def test_telling_does_not_wait_and_too_many_events_are_dropped(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(hooks, "MAX_QUEUED", 2)
    hook = Hook(script(tmp_path, "exec sleep 100"), tmp_path, 0.2)
    start = time.monotonic()
    for _ in range(10):
        hook.tell(CHECKPOINT)
    assert time.monotonic() - start < 0.2
    assert "hook: 2 events are waiting" in caplog.text
    hook.close()
    assert time.monotonic() - start < 5


def test_the_end_of_a_run_waits_for_two_limits_at_most(tmp_path, caplog):
    hook = Hook(script(tmp_path, "exec sleep 100"), tmp_path, 1.0)
    for _ in range(6):
        hook.tell(CHECKPOINT)
    start = time.monotonic()
    hook.close()
    assert time.monotonic() - start < 4 and "not run for the last events" in caplog.text


def test_it_is_no_rank_of_the_job():
    env = {"PATH": "/bin", "HOROVOD_RANK": "0", "OMPI_COMM_WORLD_RANK": "0", "RANK": "0", "SLURM_JOB_ID": "7"}
    assert without_launcher(env) == {"PATH": "/bin", "SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(("hook", "says"), [("'open", "No closing quotation"), ("   ", "wanted a command")])
def test_a_command_that_is_none_is_refused(hook, says):
    with pytest.raises(ConfigError, match=says):
        TrainConfig(hook=hook)


def test_a_program_that_does_not_exist_is_refused_before_the_run():
    with pytest.raises(ConfigError, match="hook=no-such-program x: no program no-such-program on the host"):
        check_hook("no-such-program x")
    check_hook(f"{sys.executable} -c pass")
    check_hook("sh")


def test_the_journal_tells_the_hook_and_ends_with_the_outcome_on_disk(tmp_path):
    (words,) = script(tmp_path, f"echo $1 $(test -e {tmp_path}/outcome.json && echo ended) >>{tmp_path}/seen")
    cfg = TrainConfig(hook=words)
    journal = Journal(tmp_path, Start(2, "7"), cfg, StopRequest())
    journal.record("step", step=1)
    journal.record("checkpoint", step=1)
    journal.end({"exit_code": 0, "reason": "done"})
    journal.close()
    events = (tmp_path / "seen").read_text().splitlines()
    assert events[0].startswith("checkpoint") and events[1] == "end ended" and len(events) == 2
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["step", "checkpoint", "outcome"]
    assert all((line["attempt"], line["job_id"]) == (2, "7") for line in lines)
    assert json.loads((tmp_path / "outcome.json").read_text())["attempt"] == 2
