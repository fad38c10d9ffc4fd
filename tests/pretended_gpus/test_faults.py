"""A failing rank or network is an error of the others, with its reason and in time; never a success."""

import json
import os
import signal
import sys

import pytest
from conftest import PROGRAMS
from real_ranks import wait_for

NOTICED_S = 15  # of a death; Horovod's own shutdown waits up to 10 s for what is in flight


@pytest.fixture
def fails(start, on_gpus, tmp_path):
    """Two ranks of failing.py with this fault; what each of `survivors` saw."""

    def fails(fault: str, *, survivors: list[int], **environ: str) -> list[dict]:
        environ = on_gpus | {"PRETENDED_NCCL_FAULT": fault, "HOROVOD_GLOO_TIMEOUT_SECONDS": "20"} | environ
        job = start([sys.executable, PROGRAMS / "failing.py", tmp_path], **environ)
        reports = [tmp_path / f"{rank}.json" for rank in survivors]
        try:
            wait_for(lambda: all(report.exists() and report.read_text() for report in reports), 60)
        finally:
            for pid in tmp_path.glob("*.pid"):  # a stopped one would stay
                try:
                    os.kill(int(pid.read_text()), signal.SIGKILL)
                except ProcessLookupError:
                    pass
        job.finish(60)
        return [json.loads(report.read_text()) for report in reports]

    return fails


ELASTIC = pytest.mark.parametrize("elastic", ["", "1"], ids=["static", "elastic"])
OPERATION = pytest.mark.parametrize("operation", ["allgather", "alltoall", "broadcast"])


@ELASTIC
def test_a_killed_rank_fails_what_is_in_flight(fails, elastic):
    (survivor,) = fails("kill@1:20", survivors=[0], HOROVOD_ELASTIC=elastic)
    assert survivor["error"].startswith("HorovodInternalError: a rank is gone: ")
    assert survivor["after_s"] + survivor["shutdown_s"] < NOTICED_S


@OPERATION
def test_a_killed_rank_fails_every_kind_of_operation(fails, operation):
    (survivor,) = fails("kill@1:20", survivors=[0], OPERATION=operation)
    assert survivor["error"].startswith("HorovodInternalError: a rank is gone: ")


@OPERATION
def test_an_asynchronous_error_is_noticed_in_every_kind_of_operation(fails, operation):
    seen, other = fails("async@1:20", survivors=[1, 0], OPERATION=operation)
    assert "NCCL async error: remote process exited or there was a network error" in seen["error"]
    assert seen["after_s"] < 2 and "HorovodInternalError" in other["error"]


def test_a_stopped_rank_fails_what_is_in_flight_when_gloo_gives_up(fails):
    (survivor,) = fails("stop@1:20", survivors=[0], HOROVOD_GLOO_TIMEOUT_SECONDS="5")
    assert survivor["error"].startswith("HorovodInternalError: a rank is gone: ")
    assert 4 < survivor["after_s"] < NOTICED_S


@ELASTIC
def test_an_asynchronous_error_is_quoted_and_the_others_are_told(fails, elastic):
    seen, other = fails("async@1:20", survivors=[1, 0], HOROVOD_ELASTIC=elastic)
    assert "NCCL async error: remote process exited or there was a network error" in seen["error"]
    assert seen["after_s"] < 2
    assert "HorovodInternalError" in other["error"]
    assert other["after_s"] + other["shutdown_s"] < NOTICED_S


@ELASTIC
def test_a_failed_call_is_quoted_and_the_others_are_told(fails, elastic):
    seen, other = fails("call@1:20", survivors=[1, 0], HOROVOD_ELASTIC=elastic)
    assert (
        "ncclAllReduce failed: internal error" in seen["error"]
        and "planted at collective 20" in seen["error"]
    )
    assert "HorovodInternalError" in other["error"]


def test_an_error_at_the_start_is_quoted(fails):
    for seen in fails("init@all", survivors=[0, 1]):
        assert (
            "ncclCommInitRank failed: invalid usage" in seen["error"] and "planted at init" in seen["error"]
        )


def test_two_ranks_on_one_gpu_are_refused_in_nccls_words(fails):
    for seen in fails("", survivors=[0, 1], DEVICE="0"):
        assert "Duplicate GPU detected : rank" in seen["error"]


@pytest.mark.parametrize("name", ["NCCL_MULTI_RANK_GPU_ENABLE"])
def test_two_ranks_may_share_a_gpu_where_nccl_is_told(fails, name):
    for seen in fails("", survivors=[0, 1], DEVICE="0", **{name: "1"}):
        assert seen["error"] is None
