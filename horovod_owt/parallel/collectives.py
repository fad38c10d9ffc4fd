"""Blocking collectives on small tensors and objects; every rank must call each of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Any, TypeVar

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError
from torch import Tensor

from horovod_owt.errors import OwtError, RunError
from horovod_owt.parallel.activity import now
from horovod_owt.parallel.objects import from_json, to_json

T = TypeVar("T")
SHUT_DOWN = "Horovod has been shut down"
REASON_WITHIN_S = 1.0  # after a shutdown, until every collective in flight has failed
in_flight: set[int] = set()  # Horovod's handles of collectives that were started and not yet waited for
LOST_A_RANK = "lost contact with another rank: it died, hung or exited"


def sum_over_ranks(values: Tensor, name: str) -> Tensor:
    """The elementwise sum of every rank's `values` (same shape and dtype on each)."""
    with now.waiting_in(name):
        return hvd.allreduce(values, op=hvd.Sum, name=name)


def broadcast_object(value: T | None, name: str, *, kind: type | None = None, root_rank: int = 0) -> T:
    """The root's `value` on every rank; the other ranks' argument is ignored.

    It is sent as JSON, see `objects`; `kind` is the class of any dataclasses in it.
    """
    with now.waiting_in(name):
        sent = _bytes_of(value) if hvd.rank() == root_rank else torch.empty(0, dtype=torch.uint8)
        length = hvd.broadcast(torch.tensor([len(sent)]), root_rank, f"{name}.length")
        if hvd.rank() != root_rank:
            sent = torch.empty(int(length), dtype=torch.uint8)
        text = hvd.broadcast(sent, root_rank, f"{name}.text")
    return _object_in(text, kind)


def gather_objects(value: T, name: str, *, kind: type | None = None) -> list[T]:
    """Every rank's `value`, in rank order, on every rank; sent as JSON, like `broadcast_object`."""
    with now.waiting_in(name):
        sent = _bytes_of(value)
        lengths = hvd.allgather(torch.tensor([len(sent)]), name=f"{name}.lengths")
        texts = hvd.allgather(sent, name=f"{name}.texts")
    return [_object_in(text, kind) for text in texts.split(lengths.tolist())]


def _bytes_of(value: object) -> Tensor:
    return torch.frombuffer(bytearray(to_json(value).encode()), dtype=torch.uint8)


def _object_in(text: Tensor, kind: type | None) -> Any:
    return from_json(text.numpy().tobytes().decode(), kind)


def on_root(action: Callable[[], T] | None, name: str, *, kind: type | None = None) -> T:
    """Run `action` on rank 0 and broadcast its result; an OwtError is raised on every rank.

    The other ranks' `action` is ignored; they wait until rank 0 is done. `kind` as in `broadcast_object`.
    """
    outcome = None
    if hvd.rank() == 0:
        try:
            with now.phase(name):
                outcome = action()
        except OwtError as error:
            outcome = error
    outcome = broadcast_object(outcome, name, kind=kind)
    if isinstance(outcome, OwtError):
        raise outcome.on_every_rank()
    return outcome


def bare_collective(name: str, num_bytes: int, ranks: int, device: torch.device) -> Callable[[], object]:
    """A function that runs an allreduce, allgather, alltoall or broadcast of fp32 numbers, for benchmarks.

    `num_bytes` is the size of an allgather's result; each rank sends its part.
    """
    part = torch.zeros(max(1, num_bytes // 4 // ranks), device=device)
    whole = torch.zeros(part.numel() * ranks, device=device)
    label = f"bare.{name}.{num_bytes}"
    return {
        "allreduce": lambda: hvd.allreduce_(whole, op=hvd.Sum, name=label),
        "allgather": lambda: hvd.allgather(part, name=label),
        "alltoall": lambda: hvd.alltoall(whole, name=label),
        "broadcast": lambda: hvd.broadcast_(whole, root_rank=0, name=label),
    }[name]


def broadcast_tensor(tensor: Tensor, name: str) -> Tensor:
    """Rank 0's values on every rank; the other ranks' `tensor` gives shape and dtype."""
    with now.waiting_in(name):
        return hvd.broadcast(tensor.contiguous(), root_rank=0, name=name)  # Horovod requires it


@contextmanager
def explain_lost_ranks(who: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Turn the error of a failed collective into a RunError; `who` names the lost ranks, if known."""
    try:
        yield
    except HorovodInternalError as error:
        raise collective_error(first_cause(error), who()) from error


def first_cause(error: HorovodInternalError) -> HorovodInternalError:
    """The error of the collective that failed first, if `error` only reports the shutdown that followed.

    When a collective fails, Horovod fails all others in flight with a generic error; the caller may have
    waited for one of those.
    """
    waiting, end = set(in_flight), monotonic() + REASON_WITHIN_S
    in_flight.clear()
    while SHUT_DOWN in str(error) and waiting and monotonic() < end:
        for handle in filter(hvd.poll, sorted(waiting)):
            waiting.discard(handle)
            try:
                hvd.synchronize(handle)
            except HorovodInternalError as other:
                error = error if SHUT_DOWN in str(other) else other
        sleep(0.01)
    return error


def collective_error(error: HorovodInternalError, lost: str) -> RunError:
    """The RunError for a failed collective; `lost` names the lost ranks, if known.

    NCCL's reason is always quoted, other reasons only if no lost rank is known. Horovod's generic text for a
    shutdown is not a reason.
    """
    reason = str(error).strip().partition("\n")[0]
    if SHUT_DOWN in reason:
        reason = ""
    by_nccl = re.search("nccl|cuda", reason, re.IGNORECASE)
    if by_nccl and not lost:
        fix = "set NCCL_DEBUG=INFO and see what NCCL logs; run `owt preflight`"
        return RunError(f"a collective failed: {reason}", fix=fix)
    saw = f"lost contact with {lost}: it died" if lost else LOST_A_RANK
    quoted = f" ({reason})" if reason and (by_nccl or not lost) else ""
    return RunError(
        saw + quoted,
        fix="see its last output and the launcher's; --resume auto resumes from the last checkpoint",
    )
