"""The lines of logs, on stderr and in the files of ranks."""

import json
import logging
import re

import pytest
import torch

from horovod_owt import logs
from horovod_owt.commands.log import log_to_stderr
from horovod_owt.logs import format_in_use, print_error
from horovod_owt.parallel.runtime import World
from horovod_owt.runs.records import Start
from horovod_owt.train import rank_log
from horovod_owt.train.rank_log import FULL, RankLog

log = logging.getLogger("horovod_owt.test")
UTC = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


@pytest.fixture(autouse=True)
def own_handlers(monkeypatch):
    logger = logging.getLogger(logs.PACKAGE)
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", False)
    level = logger.level
    logger.setLevel(logging.INFO)
    yield
    logger.setLevel(level)


def world(rank: int = 1) -> World:
    return World(rank, 2, rank, 2, "node7", torch.device("cpu"), 1)


def test_json_lines_have_time_level_rank_and_host(capsys, monkeypatch):
    for name, value in (("HOROVOD_RANK", 3), ("HOROVOD_SIZE", 8), ("HOROVOD_HOSTNAME", "node7")):
        monkeypatch.setenv(name, str(value))
    for name, value in (("HOROVOD_LOCAL_RANK", 1), ("HOROVOD_LOCAL_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    log_to_stderr("json")
    log.info("step %d\nand more", 7)
    log.warning("late")
    print_error("a checkpoint is missing")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["level"], line["message"]) for line in lines] == [
        ("info", "step 7\nand more"),
        ("warning", "late"),
        ("error", "a checkpoint is missing"),
    ]
    assert all((line["rank"], line["host"]) == (3, "node7") for line in lines)
    assert all(re.fullmatch(UTC, line["time"]) for line in lines)


def test_text_stays_as_it_was(capsys):
    log_to_stderr()
    log.info("step 7")
    log.warning("late")
    print_error("no such file")
    first, second, third = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d step 7", first)
    assert re.fullmatch(r"\d\d:\d\d:\d\d WARNING late", second)
    assert third == "owt: no such file"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_each_rank_has_a_file_of_what_it_said_and_how_it_ended(tmp_path, capsys, log_format):
    log_to_stderr(log_format)
    assert format_in_use() == log_format
    file = RankLog(tmp_path, Start(3, "4711"), world())
    log.warning("late")
    try:
        raise ZeroDivisionError("of nothing")
    except ZeroDivisionError as error:
        file.note(logging.ERROR, "a bug", error=error)
    file.close()
    log.warning("after the end")
    text = (tmp_path / "logs" / "attempt-0003" / "rank-0001.log").read_text()
    if log_format == "json":
        text = "\n".join(
            f"{line['time']} {line['level'].upper()} {line['message']}"
            for line in map(json.loads, text.splitlines())
        )
    first, second, third, *traceback = text.splitlines()
    assert re.fullmatch(UTC + r" INFO rank 1 of 2 on node7, cpu, process \d+, attempt 3, job 4711", first)
    assert re.fullmatch(UTC + " WARNING late", second) and re.fullmatch(UTC + " ERROR a bug", third)
    assert traceback[0].startswith("Traceback") and traceback[-1] == "ZeroDivisionError: of nothing"
    assert "a bug" not in capsys.readouterr().err


def test_no_two_processes_write_to_one_file(tmp_path):
    files = [RankLog(tmp_path, Start(1), world()) for _ in range(3)]
    for number, file in enumerate(files):
        file.note(logging.INFO, f"number {number}")
        file.close()
    folder = tmp_path / "logs" / "attempt-0001"
    for number, name in enumerate(["rank-0001.log", "rank-0001.2.log", "rank-0001.3.log"]):
        assert f"number {number}" in (folder / name).read_text()


def test_a_file_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_log, "MAX_BYTES", 1000)
    file = RankLog(tmp_path, Start(1), world())
    for number in range(100):
        log.warning("line %d of many", number)
    lines = (tmp_path / "logs" / "attempt-0001" / "rank-0001.log").read_text().splitlines()
    assert lines[-1] == FULL and 5 < len(lines) < 40
    file.close()


def test_the_files_of_the_last_attempts_are_kept(tmp_path):
    for attempt in range(1, 14):
        RankLog(tmp_path, Start(attempt), world(0)).close()
    kept = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert kept == [f"attempt-{number:04d}" for number in range(4, 14)]


def test_a_rank_that_cannot_write_there_has_none(tmp_path, capsys):
    log_to_stderr()
    file = RankLog(tmp_path / "on another host", Start(1), world())
    log.warning("late")
    file.close()
    assert "late" in capsys.readouterr().err and not (tmp_path / "on another host").exists()


def test_a_full_disk_costs_the_file_and_nothing_else(tmp_path, capsys):
    log_to_stderr()
    file = RankLog(tmp_path, Start(1), world())

    class Full:
        def write(self, line):
            raise OSError(28, "No space left on device")

        def close(self):
            raise OSError(28, "No space left on device")

    file._file = Full()
    log.warning("late")
    log.warning("later")
    file.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line[9:] for line in lines] == ["WARNING late", "WARNING later"]
