"""What must hold of the transfers in an fc_group, on numbers that are each rank's own."""

import numpy as np
import torch
from torch import Tensor

from horovod_owt.parallel.collectives import sum_over_ranks
from horovod_owt.parallel.exchange import Exchange, Slice, split_sizes
from horovod_owt.parallel.runtime import World
from horovod_owt.parallel.traffic import Traffic

ROWS, UNITS = 3, 10  # of one rank; 4 ranks cannot share 10 units evenly


def check_exchange(world: World, group_size: int) -> dict:
    """Sums over all ranks of <forward(x), y> and <x, backward(y)>, and what else is to be equal; by name."""
    group = world.fc_group(group_size)
    exchange = Exchange(group, Traffic(torch.device("cpu")))
    draw = torch.Generator().manual_seed(100 * group_size + world.rank)

    def random(rows: int, units: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(rows, units, generator=draw, dtype=torch.float64).to(dtype)

    def over_ranks(left: Tensor, right: Tensor) -> float:
        assert left.shape == right.shape and left.dtype == right.dtype == torch.float64
        return sum_over_ranks((left * right).sum(), "product").item()

    found = {}
    all_rows, sizes = ROWS * group_size, split_sizes(UNITS, group_size)
    own_units = sizes[group.index]

    x, y = random(ROWS, UNITS), random(all_rows, UNITS)
    forward, back = exchange.allgather_rows(x, "x").wait(), exchange.reduce_scatter_rows(y, "y").wait()
    found["rows"] = over_ranks(forward, y), over_ranks(x, back)

    x, y = random(all_rows, UNITS), random(all_rows, own_units)
    forward, back = exchange.reduce_scatter_units(x, "x").wait(), exchange.allgather_units(y, "y").wait()
    found["units"] = over_ranks(forward, y), over_ranks(x, back)

    for owner in range(group_size):
        x, y = random(ROWS, UNITS), random(ROWS, UNITS)
        forward = exchange.broadcast_rows(x, owner, "x").wait()
        back = exchange.reduce_rows(y, owner, "y").wait()
        assert len(back) == (ROWS if owner == group.index else 0)
        lent = x[: len(back)]  # by the others nothing
        found[f"lend {owner}"] = over_ranks(forward, y), over_ranks(lent, back)

    x, y = random(ROWS, UNITS), random(ROWS, UNITS)
    forward, back = exchange.allreduce(x, "x").wait(), exchange.allreduce(y, "y").wait()
    found["everywhere"] = over_ranks(forward, y), over_ranks(x, back)

    # from here on: 0 where all is equal
    whole = torch.arange(4 * UNITS * 3.0).view(4, UNITS, 3)
    mine = Slice(1, range(sum(sizes[: group.index]), sum(sizes[: group.index + 1])))
    found["whole tensors"] = over_ranks_unequal(exchange.gather_whole(mine.of(whole), mine), whole)

    # all words that bf16 has, NaNs with their payloads too, turned around by each rank
    words = torch.from_numpy(np.arange(-(2**15), 2**15, dtype=np.int16)).view(256, 256)
    by_rank = [words.roll(rank, dims=1) for rank in group.ranks]
    sent = by_rank[group.index].view(torch.bfloat16)
    gathered = exchange.allgather_rows(sent, "words").wait()
    found["bf16 rows"] = over_ranks_unequal(gathered.view(torch.int16), torch.cat(by_rank))
    lent = exchange.broadcast_rows(sent, group_size - 1, "words").wait()
    found["bf16 lent"] = over_ranks_unequal(lent.view(torch.int16), by_rank[-1])

    # sums of bf16 are taken in fp32
    parts = random(all_rows, UNITS, torch.bfloat16)
    everyones = exchange.allgather_rows(parts, "parts").wait().view(group_size, all_rows, UNITS)
    own = slice(ROWS * group.index, ROWS * (group.index + 1))
    in_fp32 = everyones.float().sum(dim=0)[own]
    summed = exchange.reduce_scatter_rows(parts, "parts").wait()
    found["bf16 sums"] = over_ranks_unequal(summed, in_fp32)
    return found


def over_ranks_unequal(left: Tensor, right: Tensor) -> int:
    """How many numbers differ, over all ranks; a different shape or dtype is an error."""
    assert left.shape == right.shape and left.dtype == right.dtype, (left.dtype, right.dtype)
    return int(sum_over_ranks((left != right).sum(), "unequal"))
