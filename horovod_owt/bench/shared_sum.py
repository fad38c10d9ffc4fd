"""What a sum through shared memory can reach on this host: its copies and additions, without any waiting.

Each rank copies what the others add to a segment that all have mapped, adds up its own share, and copies the
others' sums out, chunk by chunk, so that the segment stays in the caches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import numpy as np

from horovod_owt.data.cache import MEMORY
from horovod_owt.filesystem import extend, partial_file, unlink_quietly
from horovod_owt.parallel.collectives import broadcast_object, gather_objects
from horovod_owt.parallel.parts import time_each
from horovod_owt.parallel.runtime import World

CHUNK_BYTES = 1 << 20


def shared_sum_s(world: World, num_bytes: int, *, repeats: int) -> list[float] | None:
    """Seconds of each sum of a buffer of fp32 numbers on its slowest rank; None if not all share memory."""
    with _segment(world) as slots:
        if not all(gather_objects(slots is not None, "shared_sum.mapped")):
            return None
        values = np.zeros((num_bytes // CHUNK_BYTES, CHUNK_BYTES // 4), dtype=np.float32)
        return time_each(lambda: sum_chunks(values, slots, world.rank), world, repeats=repeats)


def sum_chunks(values: np.ndarray, slots: np.ndarray, rank: int) -> None:
    """A rank's part of it, with a slot of memory for each. As nobody waits, only zeros come out right."""
    edges = np.linspace(0, values.shape[1], len(slots) + 1).astype(int)
    shares = [slice(*pair) for pair in pairwise(edges)]
    for chunk in values:
        for other, share in enumerate(shares):
            if other != rank:
                slots[rank][share] = chunk[share]
        mine = shares[rank]
        for other in range(len(slots)):
            if other != rank:
                chunk[mine] += slots[other][mine]
        slots[rank][mine] = chunk[mine]
        for other, share in enumerate(shares):
            if other != rank:
                chunk[share] = slots[other][share]


@contextmanager
def _segment(world: World) -> Iterator[np.ndarray | None]:
    """A slot of a chunk for each rank, in memory that all map; None where this one cannot."""
    path, slots = Path(broadcast_object(str(partial_file(MEMORY)), "shared_sum.path")), None
    try:
        if broadcast_object(world.is_root and _made(path, world.size * CHUNK_BYTES), "shared_sum.made"):
            with suppress(OSError):
                slots = np.memmap(path, np.float32, "r+", shape=(world.size, CHUNK_BYTES // 4))
        gather_objects(None, "shared_sum.open")  # then it needs no name
    finally:
        if world.is_root:
            unlink_quietly(path)
    yield slots


def _made(path: Path, size: int) -> bool:
    try:
        with open(path, "xb") as file:
            extend(file.fileno(), size)
    except OSError:
        return False
    return True
