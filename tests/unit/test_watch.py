"""What `watched` makes of what the heartbeat tells it, and the files of stacks."""

import json
import logging
import os
import signal
from contextlib import contextmanager

import pytest
import torch

from horovod_owt.parallel.activity import now
from horovod_owt.parallel.runtime import World
from horovod_owt.runs.records import Start
from horovod_owt.train import watch
from horovod_owt.train.watch import Stacks, watched


class Ended(BaseException):
    """In place of the process's end."""


class Heartbeat:
    """Takes what the real one takes, and leaves it to the test to call that."""

    def __init__(self, world, **told) -> None:
        self.world, self.told = world, told

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def under_watch(tmp_path, monkeypatch):
    """Enters `watched` on a rank; gives its callbacks and limits by name, and what it recorded."""

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(watch, "Heartbeat", Heartbeat)
    monkeypatch.setattr(watch.os, "_exit", end)
    monkeypatch.setattr(now, "step", 41)

    @contextmanager
    def enter(rank=0, stall_limit_s=600.0, **options):
        recorded = []
        world = World(rank, 4, rank, 4, "node6", torch.device("cpu"), 1)

        def record(kind, **values):
            recorded.append((kind, values))

        options = {"start": Start(2, "4711"), "stall_limit_s": stall_limit_s, "record": record, **options}
        with watched(world, tmp_path, **options) as heartbeat:
            assert heartbeat.world is world
            yield heartbeat.told, recorded

    return enter


def outcome(run_dir):
    file = run_dir / "outcome.json"
    return json.loads(file.read_text()) if file.exists() else None


def test_a_report_is_a_warning_and_a_fault_with_the_step(under_watch, tmp_path, caplog):
    with under_watch() as (told, recorded), caplog.at_level(logging.WARNING):
        told["report"]("rank 3 on node7 has been silent for 60 s")
    assert caplog.messages == [
        f"stalled: rank 3 on node7 has been silent for 60 s; stacks are in {tmp_path / 'stacks'}"
    ]
    assert recorded == [("fault", {"fault": "stalled: rank 3 on node7 has been silent for 60 s", "step": 41})]
    assert outcome(tmp_path) is None


@pytest.mark.parametrize("checkpoints", [[], ["step-00000008", "step-00000030"]])
def test_a_job_ended_after_the_stall_limit_reports_why_and_how_to_resume(
    under_watch, tmp_path, capsys, checkpoints
):
    for name in checkpoints:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    with under_watch(rank=1) as (told, recorded):
        with pytest.raises(Ended) as ended:
            told["give_up"]("rank 0 on node6 has been silent for 600 s")
    assert ended.value.args == (1,)
    wanted = outcome(tmp_path)
    assert (wanted["exit_code"], wanted["step"]) == (1, 41)
    assert (wanted["attempt"], wanted["job_id"]) == (2, "4711")
    assert recorded == [("outcome", {key: wanted[key] for key in ("exit_code", "reason", "step")})]
    assert wanted["reason"].startswith("stalled: rank 0 on node6 has been silent for 600 s; ")
    assert ("step-00000030" if checkpoints else "no checkpoint yet") in wanted["reason"]
    assert capsys.readouterr().err == f"owt: [rank 1 node6] {wanted['reason']}\n"


@pytest.mark.parametrize(
    ("rank", "options", "written"),
    [(0, {}, True), (1, {}, True), (2, {}, False), (0, {"elastic": True}, False)],
    ids=["rank 0", "rank 1", "rank 2", "an elastic job"],
)
def test_a_death_is_on_record_before_the_launcher_ends_this_rank(
    under_watch, tmp_path, rank, options, written
):
    with under_watch(rank=rank, **options) as (told, _):
        told["on_death"]("rank 3 on node7 (last heard of after step 40)")
    reason = "lost contact with rank 3 on node7 (last heard of after step 40): it died"
    found = outcome(tmp_path)
    assert written == (found is not None)
    if found:
        assert found.pop("time")[-1] == "Z"
        assert found == {"attempt": 2, "job_id": "4711", "exit_code": 1, "reason": reason, "step": 41}


@pytest.mark.parametrize(
    ("stall_limit_s", "elastic", "limits"),
    [
        (600.0, False, (60.0, 600.0, None)),
        (30.0, False, (15.0, 30.0, None)),
        (600.0, True, (60.0, 600.0, 20.0)),
        (30.0, True, (15.0, 30.0, 15.0)),
    ],
)
def test_limits_follow_the_stall_limit(under_watch, stall_limit_s, elastic, limits):
    with under_watch(stall_limit_s=stall_limit_s, elastic=elastic) as (told, _):
        assert (told["report_s"], told["give_up_s"], told["regroup_s"]) == limits


def test_stacks_are_dumped_when_asked_for_and_on_sigquit(under_watch, tmp_path):
    file = tmp_path / "stacks" / "rank-0002.txt"
    with under_watch(rank=2) as (told, _):
        told["dump"]("rank 3 is late")
        assert " rank 3 is late\n" in file.read_text()
        assert file.read_text().count("test_stacks_are_dumped_when_asked_for_and_on_sigquit") == 1
        os.kill(os.getpid(), signal.SIGQUIT)
        assert file.read_text().count("test_stacks_are_dumped_when_asked_for_and_on_sigquit") == 2
    assert file.exists()  # for whoever comes to see


def test_a_run_without_trouble_leaves_no_stacks(tmp_path):
    ours, another = Stacks(tmp_path, 0), Stacks(tmp_path, 1)
    another.dump("late")
    ours.close()
    another.close()
    assert [file.name for file in (tmp_path / "stacks").iterdir()] == ["rank-0001.txt"]
    (tmp_path / "stacks" / "rank-0001.txt").unlink()
    Stacks(tmp_path, 0).close()
    assert not (tmp_path / "stacks").exists()
