"""What the control groups of this process allow it: memory and CPU time, by versions 1 and 2 of cgroups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# A group's limit and usage, and in memory.stat what is a cache of files. Without a limit v1 has nearly 2**63.
MEMORY_V2 = "memory.max", "memory.current", ("inactive_file", "active_file")
MEMORY_V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")


def memory_limits() -> list[tuple[int, int]]:
    """Bytes allowed and in use, of each group with a limit; file caches count as free."""
    found = []
    for group, version in _own_groups("memory"):
        limit, usage, of_files = MEMORY_V1 if version == 1 else MEMORY_V2
        try:
            most, used = (int(_read(group / name)) for name in (limit, usage))
            lines = (line.split() for line in _read(group / "memory.stat").splitlines())
            used -= sum(int(value) for name, value in lines if name in of_files)
        except (OSError, ValueError):  # "max", or not the memory controller's, or not to be seen from here
            continue
        found.append((most, used))
    return found


def cpu_quota() -> float | None:
    """CPUs that may be busy at a time, as of `docker run --cpus=4`; None without such a limit.

    Threads beyond that number are stopped in turn. The process's cores (its affinity) do not show it.
    """
    quotas = []
    for group, version in _own_groups("cpu"):
        try:
            if version == 1:
                quota, period = (int(_read(group / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
            else:
                quota, period = map(int, _read(group / "cpu.max").split())
        except (OSError, ValueError):  # "max"
            continue
        if quota > 0 < period:
            quotas.append(quota / period)
    return min(quotas, default=None)


def within_quota(cores: int, ranks: int = 1) -> int:
    """Threads for one of `ranks` processes that share the quota, at most `cores`, at least one."""
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota / ranks)))


def _own_groups(controller: str) -> Iterator[tuple[Path, int]]:
    """The folders of this process's groups, from its own up, each with the version of its cgroups."""
    try:
        lines = _read(OWN_CGROUP).splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controller if controllers else CGROUPS
        folder = root / own.lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(root):
                break
            yield group, 1 if controllers else 2


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8")
