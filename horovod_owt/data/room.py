"""How much of a host's memory or disk a cache may take."""

from __future__ import annotations

from pathlib import Path

import psutil

from horovod_owt.filesystem import free_space, size_of_disk

SPARED = 0.1  # share of a file system, and of memory, that caches leave free,
SPARED_BYTES = 10 * 10**9  # but of a file system not more than this
CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def room_in(folder: Path, *, memory: bool) -> int:
    """Bytes that a cache in `folder` may still take; `memory` says that files there are in memory."""
    free, _ = free_space(folder)
    size = size_of_disk(folder)
    room = 1 << 62 if free is None else free - min(int(SPARED * size), SPARED_BYTES)
    if memory:
        host = psutil.virtual_memory()
        room = min(room, host.available - int(SPARED * host.total), *_rest_of_cgroups())
    return max(0, room)


def _rest_of_cgroups() -> list[int]:
    """Bytes left to this process's groups under cgroups v2, with limits; file caches count as free."""
    try:
        groups = [
            line[3:] for line in OWN_CGROUP.read_text(encoding="utf-8").splitlines() if line.startswith("0::")
        ]
    except OSError:
        return []
    root = CGROUPS
    folder = root / groups[0].lstrip("/") if groups else root
    rests = []
    for group in (folder, *folder.parents):
        if not group.is_relative_to(root):
            break
        try:
            most = int((group / "memory.max").read_text(encoding="utf-8"))
            used = int((group / "memory.current").read_text(encoding="utf-8"))
            lines = (
                line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines()
            )
            used -= sum(int(value) for name, value in lines if name in ("inactive_file", "active_file"))
        except (OSError, ValueError):  # "max", or not the memory controller's
            continue
        rests.append(int((1 - SPARED) * most) - used)
    return rests
