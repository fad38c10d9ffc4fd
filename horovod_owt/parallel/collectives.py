"""The collectives that training needs; every rank must call each of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import horovod.torch as hvd
from horovod.common.exceptions import HorovodInternalError
from torch import Tensor

from horovod_owt.errors import OwtError, RunError
from horovod_owt.parallel.activity import now

T = TypeVar("T")
SHUT_DOWN = "Horovod has been shut down"
LOST_SOMEBODY = "lost contact with another rank: it died, hung or exited"


def sum_over_ranks(values: Tensor, name: str) -> Tensor:
    """The elementwise sum of every rank's `values` (same shape and dtype on each)."""
    with now.waiting_in(name):
        return hvd.allreduce(values, op=hvd.Sum, name=name)


def broadcast_object(value: T | None, name: str) -> T:
    """Rank 0's `value` on every rank; the other ranks' argument is ignored."""
    with now.waiting_in(name):
        return hvd.broadcast_object(value, root_rank=0, name=name)


def on_root(action: Callable[[], T] | None, name: str) -> T:
    """Run `action` on rank 0 and broadcast its result; an OwtError is raised on every rank.

    The other ranks' argument is ignored. They wait until rank 0 is done.
    """
    outcome = None
    if hvd.rank() == 0:
        try:
            with now.phase(name):
                outcome = action()
        except OwtError as error:
            outcome = error
    outcome = broadcast_object(outcome, name)
    if isinstance(outcome, OwtError):
        raise outcome.on_every_rank()
    return outcome


def gather_objects(value: T, name: str) -> list[T]:
    """Every rank's `value`, in rank order, on every rank."""
    with now.waiting_in(name):
        return hvd.allgather_object(value, name=name)


def broadcast_tensor(tensor: Tensor, name: str) -> Tensor:
    """Rank 0's values on every rank; the other ranks' tensors give shape and dtype."""
    with now.waiting_in(name):
        return hvd.broadcast(tensor.contiguous(), root_rank=0, name=name)  # Horovod requires it


@contextmanager
def explain_lost_ranks(who: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Turn the error of a failed collective into a RunError; `who` may name a peer that is gone."""
    try:
        yield
    except HorovodInternalError as error:
        raise collective_error(error, who()) from error


def collective_error(error: HorovodInternalError, lost: str) -> RunError:
    """NCCL's own reason is quoted, and any other one where no lost rank is known.

    The text that Horovod has for every shutdown is no reason.
    """
    reason = str(error).strip().partition("\n")[0]
    if SHUT_DOWN in reason:
        reason = ""
    by_nccl = re.search("nccl|cuda", reason, re.IGNORECASE)
    if by_nccl and not lost:
        fix = "set NCCL_DEBUG=INFO and see what NCCL logs; run `owt preflight`"
        return RunError(f"a collective failed: {reason}", fix=fix)
    saw = f"lost contact with {lost}: it died" if lost else LOST_SOMEBODY
    quoted = f" ({reason})" if reason and (by_nccl or not lost) else ""
    return RunError(
        saw + quoted,
        fix="see its last output and the launcher's; --resume auto resumes from the last checkpoint",
    )
