"""What is made of the errors of collectives."""

import pytest
from horovod.common.exceptions import HorovodInternalError

from horovod_owt.errors import RunError
from horovod_owt.parallel.collectives import explain_lost_ranks

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
