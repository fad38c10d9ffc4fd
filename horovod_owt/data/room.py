"""How much of a host's memory or disk a cache may take."""

from __future__ import annotations

from pathlib import Path

import psutil

from horovod_owt.filesystem import free_space, size_of_disk

SPARED = 0.1  # share of a file system, and of memory, that caches leave free,
SPARED_BYTES = 10 * 10**9  # but of a file system not more than this
CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# A group's limit and usage, and in memory.stat what is a cache of files. Without a limit v1 has nearly 2**63.
V2 = "memory.max", "memory.current", ("inactive_file", "active_file")
V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")


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
    """Bytes left to this process's groups with limits; file caches count as free."""
    try:
        lines = OWN_CGROUP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    rests = []
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = (CGROUPS / "memory", V1) if controllers else (CGROUPS, V2)
        folder = root / own.lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(root):
                break
            rests += _rest_of(group, *names)
    return rests


def _rest_of(group: Path, limit: str, usage: str, of_files: tuple[str, str]) -> list[int]:
    """Empty for a group without a limit, or that is not to be seen from here."""
    try:
        most = int((group / limit).read_text(encoding="utf-8"))
        used = int((group / usage).read_text(encoding="utf-8"))
        lines = (line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        used -= sum(int(value) for name, value in lines if name in of_files)
    except (OSError, ValueError):  # "max", or not the memory controller's
        return []
    return [int((1 - SPARED) * most) - used]
