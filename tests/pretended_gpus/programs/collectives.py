"""Every collective that training uses, by Horovod's NCCL code; rank 0 prints a line of JSON."""

import ctypes
import json
import os
import statistics
import time

import horovod.torch as hvd
import torch

torch.cuda.set_device(int(os.environ["HOROVOD_LOCAL_RANK"]))
size = int(os.environ["HOROVOD_SIZE"])
pairs = [hvd.ProcessSet([first, first + 1]) for first in range(0, size, 2)] if size > 2 else []
hvd.init(process_sets=pairs)
rank = hvd.rank()


def expect(seen: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(seen.cpu(), wanted, rtol=0, atol=0)


def check_sums() -> None:
    for dtype in (torch.float16, torch.float32, torch.float64, torch.int32, torch.int64):
        own = (torch.arange(6) + rank).to(dtype)
        summed = hvd.allreduce(own.cuda(), op=hvd.Sum, name=f"sum.{dtype}")
        expect(summed, (size * torch.arange(6) + size * (size - 1) // 2).to(dtype))
    expect(hvd.allreduce(torch.tensor([float(rank)]).cuda(), name="mean"), torch.tensor([(size - 1) / 2]))


def check_large_pieces() -> None:
    """In place and several at a time, each larger than a rank's slot in the stand-in."""
    flat = torch.arange(10_000_000.0).cuda()
    handles = [
        hvd.allreduce_async_(piece, op=hvd.Sum, name=f"piece.{i}")
        for i, piece in enumerate(flat.split(4 * 2**20))
    ]
    for handle in handles:
        hvd.synchronize(handle)
    expect(flat, size * torch.arange(10_000_000.0))


def check_the_rest() -> None:
    rows = torch.full((rank + 1, 3), float(rank))
    gathered = hvd.allgather(rows.cuda(), name="uneven rows")
    expect(gathered, torch.cat([torch.full((r + 1, 3), float(r)) for r in range(size)]))
    same = hvd.allgather(torch.full((2, 3), rank).cuda(), name="even rows")
    expect(same, torch.cat([torch.full((2, 3), r) for r in range(size)]))
    sent = hvd.broadcast((torch.arange(5) + rank).half().cuda(), root_rank=1, name="broadcast")
    expect(sent, (torch.arange(5) + 1).half())
    own = torch.arange(2.0 * size).view(2 * size, 1) + 100 * rank
    arrived, _ = hvd.alltoall(own.cuda(), splits=torch.tensor([2] * size, dtype=torch.int32), name="alltoall")
    expect(
        arrived, torch.cat([torch.tensor([[2.0 * rank], [2.0 * rank + 1]]) + 100 * r for r in range(size)])
    )
    to_one = torch.tensor([3] + [0] * (size - 1), dtype=torch.int32)
    arrived, _ = hvd.alltoall((torch.arange(3.0) + rank).cuda(), splits=to_one, name="to one")
    assert len(arrived) == (3 * size if rank == 0 else 0)
    assert [one["rank"] for one in hvd.allgather_object({"rank": rank})] == list(range(size))


def check_no_host_waits() -> None:
    """Horovod's threads wait for events by asking, and order the streams by events: no queue runs dry.

    Where it allocates an output it could wait for the stream, which has all of the training's work.
    """
    host_waits = ctypes.CDLL(None).pretended_host_waits
    own, splits = torch.zeros(2 * size, 3).cuda(), torch.tensor([2] * size, dtype=torch.int32)
    for name, start in {
        "allreduce": lambda: hvd.allreduce_async_(own, op=hvd.Sum, name="no wait, allreduce"),
        "allgather": lambda: hvd.allgather_async(own, name="no wait, allgather"),
        "alltoall": lambda: hvd.alltoall_async(own, splits, name="no wait, alltoall"),
        "broadcast": lambda: hvd.broadcast_async(own, root_rank=0, name="no wait, broadcast"),
    }.items():
        before = host_waits()
        hvd.synchronize(start())
        assert host_waits() == before, name


def check_sets() -> None:
    for pair in pairs:
        if rank in pair.ranks:
            own = torch.tensor([float(rank)]).cuda()
            summed = hvd.allreduce(own, op=hvd.Sum, name=f"pair {pair.ranks}", process_set=pair)
            expect(summed, torch.tensor([float(sum(pair.ranks))]))


check_sums()
check_large_pieces()
check_the_rest()
check_no_host_waits()
check_sets()
small, times_ms = torch.zeros(1).cuda(), []
for _ in range(100):
    start = time.perf_counter()
    hvd.synchronize(hvd.allreduce_async_(small, op=hvd.Sum, name="small"))
    times_ms.append(1e3 * (time.perf_counter() - start))
if rank == 0:
    small_ms = {"p10": statistics.quantiles(times_ms, n=10)[0], "median": statistics.median(times_ms)}
    print(json.dumps({"ranks": size, "nccl": hvd.nccl_built(), "small_allreduce_ms": small_ms}), flush=True)
hvd.shutdown()
