"""How much of a host's memory or disk a cache may take."""

from __future__ import annotations

from pathlib import Path

import psutil

from horovod_owt.cgroups import memory_limits
from horovod_owt.filesystem import free_space, size_of_disk

SPARED = 0.1  # share of a file system, and of memory, that caches leave free,
SPARED_BYTES = 10 * 10**9  # but of a file system not more than this


def room_in(folder: Path, *, memory: bool) -> int:
    """Bytes that a cache in `folder` may still take; `memory` says that files there are in memory."""
    free, _ = free_space(folder)
    size = size_of_disk(folder)
    room = 1 << 62 if free is None else free - min(int(SPARED * size), SPARED_BYTES)
    if memory:
        host = psutil.virtual_memory()
        rests = [int((1 - SPARED) * most) - used for most, used in memory_limits()]
        room = min(room, host.available - int(SPARED * host.total), *rests)
    return max(0, room)
