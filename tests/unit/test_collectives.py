"""What is made of the errors of collectives."""

import horovod.torch as hvd
import pytest
import torch
from horovod.common.exceptions import HorovodInternalError

from horovod_owt.errors import RunError
from horovod_owt.parallel import collectives
from horovod_owt.parallel.collectives import explain_lost_ranks, first_cause, in_flight
from horovod_owt.parallel.traffic import Traffic, Transfer

SHUT_DOWN = (
    "Horovod has been shut down. This was caused by an exception on one of the ranks or an attempt to ..."
)
NCCL = "ncclCommInitRank failed: invalid usage (run with NCCL_DEBUG=WARN for details)"
GLOO = "[/tmp/gloo/transport/tcp/pair.cc:589] Read error [127.0.0.1]:4711: Connection reset by peer"
RANK_1 = "rank 1 on node7 (last heard from after step 3)"


@pytest.mark.parametrize(
    ("reason", "lost", "said"),
    [
        (SHUT_DOWN, "", "lost contact with another rank: it died, hung or exited; fix: see its last output"),
        (SHUT_DOWN, RANK_1, f"lost contact with {RANK_1}: it died; fix: see its last output"),
        (NCCL, "", f"a collective failed: {NCCL}; fix: set NCCL_DEBUG=INFO"),
        (NCCL, RANK_1, f"lost contact with {RANK_1}: it died ({NCCL}); fix: see its last output"),
        (GLOO, "", f"lost contact with another rank: it died, hung or exited ({GLOO}); fix: see its last"),
        (GLOO, RANK_1, f"lost contact with {RANK_1}: it died; fix: see its last output"),
    ],
)
def test_the_reason_is_quoted_where_it_tells_something(reason, lost, said):
    with pytest.raises(RunError) as caught, explain_lost_ranks(lambda: lost):
        raise HorovodInternalError(f"{reason}\nand a second line")
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("others", "said"),
    [([SHUT_DOWN, NCCL, SHUT_DOWN], NCCL), ([SHUT_DOWN], SHUT_DOWN), ([], SHUT_DOWN)],
)
def test_the_first_cause_is_found_among_what_is_in_flight(monkeypatch, others, said):
    """A collective that had not begun when another one failed only knows that Horovod was shut down."""

    def fail(handle):
        raise HorovodInternalError(others[handle])

    monkeypatch.setattr(hvd, "synchronize", fail)
    monkeypatch.setattr(hvd, "poll", lambda handle: True)
    for handle in range(len(others)):
        Transfer(handle, Traffic(torch.device("cpu")), "sum")
    assert str(first_cause(HorovodInternalError(SHUT_DOWN))) == said
    assert not in_flight


def test_the_one_that_was_waited_for_is_not_asked_again(monkeypatch):
    """Horovod has forgotten its handle then, and raises ValueError."""

    def fail(handle):
        raise HorovodInternalError(SHUT_DOWN)

    monkeypatch.setattr(hvd, "synchronize", fail)
    monkeypatch.setattr(hvd, "poll", lambda handle: pytest.fail(f"handle {handle} polled"))
    with pytest.raises(RunError, match="lost contact"), explain_lost_ranks():
        Transfer(7, Traffic(torch.device("cpu")), "sum").wait()


def test_a_collective_that_does_not_end_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(collectives, "REASON_WITHIN_S", 0.05)
    monkeypatch.setattr(hvd, "poll", lambda handle: False)
    Transfer(0, Traffic(torch.device("cpu")), "sum")
    assert str(first_cause(HorovodInternalError(SHUT_DOWN))) == SHUT_DOWN
