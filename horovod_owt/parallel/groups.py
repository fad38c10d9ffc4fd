"""Groups of ranks that communicate together, each a Horovod process set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import horovod.torch as hvd


@dataclass(frozen=True)
class Group:
    """Ranks that communicate together, and this rank's index among them."""

    ranks: tuple[int, ...]  # numbered over the whole job, ascending
    index: int  # of this rank within `ranks`
    process_set: hvd.ProcessSet | None  # None for a group of one rank

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def is_alone(self) -> bool:
        return self.size == 1


def fc_group_ranks(world_size: int, group_size: int) -> list[tuple[int, ...]]:
    """The fc_groups of a job: `group_size` consecutive ranks each. A host's ranks are consecutive."""
    assert world_size % group_size == 0
    return [tuple(range(start, start + group_size)) for start in range(0, world_size, group_size)]


def shard_group_ranks(world_size: int, group_size: int) -> list[tuple[int, ...]]:
    """The groups of ranks that hold the same weight shard: one rank of each fc_group, at the same index."""
    return [tuple(range(index, world_size, group_size)) for index in range(group_size)]


def process_sets(world_size: int, group_size: int) -> list[hvd.ProcessSet]:
    """The process sets for `hvd.init`, which rejects a set of all ranks; a single rank needs none."""
    wanted = fc_group_ranks(world_size, group_size) + shard_group_ranks(world_size, group_size)
    return [hvd.ProcessSet(list(ranks)) for ranks in wanted if 1 < len(ranks) < world_size]


def group_of(rank: int, groups: list[tuple[int, ...]], sets: Sequence[hvd.ProcessSet]) -> Group:
    """The group that contains `rank`, with its process set: one of `sets`, or the global one."""
    (ranks,) = [ranks for ranks in groups if rank in ranks]
    if len(ranks) == 1:
        return Group(ranks, 0, None)
    known = {tuple(process_set.ranks): process_set for process_set in [hvd.global_process_set, *sets]}
    return Group(ranks, ranks.index(rank), known[ranks])
