"""Time every collective that training uses over a range of sizes.

Bandwidths as nccl-tests defines them: algbw is the size divided by the time; busbw is algbw times the share
of the size that the best algorithm puts on each rank's link: 2 (n-1)/n for an allreduce, (n-1)/n for an
allgather or alltoall, 1 for a broadcast. Sizes are of the whole buffer: for an allgather, of its result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from horovod_owt.errors import ConfigError
from horovod_owt.parallel import runtime
from horovod_owt.parallel.collectives import bare_collective, gather_objects
from horovod_owt.parallel.parts import time_each
from horovod_owt.parallel.runtime import World
from horovod_owt.topology import rank_topology
from horovod_owt.train.prepare import choose_device

MIN_BYTES, MAX_BYTES, FACTOR = 1 << 10, 256 << 20, 4
BUDGET_BYTES = 1 << 30  # moved for one size: small ones are repeated more often
MAX_REPEATS, MIN_REPEATS = 100, 3

log = logging.getLogger(__name__)

# busbw / algbw for n ranks
BUS_FACTORS: dict[str, Callable[[int], float]] = {
    "allreduce": lambda n: 2 * (n - 1) / n,
    "allgather": lambda n: (n - 1) / n,
    "alltoall": lambda n: (n - 1) / n,
    "broadcast": lambda n: 1.0,
}


def sizes(low: int, high: int) -> list[int]:
    """From `low` to at most `high` bytes, each FACTOR times the previous one; raises ConfigError."""
    if not 4 <= low <= high:
        raise ConfigError(
            f"--min-bytes {low} --max-bytes {high}", wanted="both at least 4, the first not above the second"
        )
    found = []
    while low <= high:
        found.append(low)
        low *= FACTOR
    return found


def bench_collectives(cfg: Any, low: int, high: int) -> dict[str, Any] | None:
    """A row for each collective and size from `low` to `high` bytes; returns the report on rank 0, else None.

    Raises ConfigError on a single rank.
    """
    wanted = sizes(low, high)
    topology = rank_topology()
    if topology.world_size == 1:
        raise ConfigError(
            "bench collectives on one rank",
            wanted="several ranks",
            fix="horovodrun --gloo -np 2 owt bench collectives",
        )
    device = choose_device(cfg, topology)
    world = runtime.init(device)
    runtime.check_devices(device, world)
    rows = []
    for name in BUS_FACTORS:
        for size in wanted:
            row = _row(name, size, world)
            rows.append(row)
            if world.is_root:
                log.info(
                    "%s of %d bytes: %.1f us, %.3f GB/s", name, size, row["us"]["median"], row["busbw_gb_s"]
                )
    report = {"rows": rows, "method": _method(world)}
    runtime.shutdown()
    return report if world.is_root else None


def _row(name: str, size: int, world: World) -> dict[str, Any]:
    repeats = max(MIN_REPEATS, min(MAX_REPEATS, BUDGET_BYTES // size // 4))
    seconds = np.array(
        time_each(bare_collective(name, size, world.size, world.device), world, repeats=repeats)
    )
    p25, median, p75 = np.percentile(seconds, [25, 50, 75])
    algbw = size / median / 1e9
    return {
        "collective": name,
        "bytes": size,
        "us": {"min": 1e6 * seconds.min(), "p25": 1e6 * p25, "median": 1e6 * median, "p75": 1e6 * p75},
        "algbw_gb_s": algbw,
        "busbw_gb_s": algbw * BUS_FACTORS[name](world.size),
        "repeats": repeats,
    }


def _method(world: World) -> dict[str, Any]:
    versions = runtime.versions()
    return {
        "library": "nccl" if world.device.type == "cuda" else versions["horovod_controller"],
        "ranks": world.size,
        "hosts": gather_objects(world.host, "bench.hosts"),
        "device": str(world.device),
        "time": "median of the repeats, each on its slowest rank, after two untimed",
        "bandwidths": "as nccl-tests defines them; GB are 1e9 bytes",
        "versions": versions,
    }


def format_collectives_report(report: dict[str, Any]) -> str:
    """The report as text."""
    method = report["method"]
    lines = [
        f"{method['library']}, {method['ranks']} ranks, {method['device']}",
        "",
        f"{'collective':12}{'bytes':>12}{'p25 us':>12}{'median us':>12}{'algbw GB/s':>12}{'busbw GB/s':>12}",
    ]
    for row in report["rows"]:
        lines.append(
            f"{row['collective']:12}{row['bytes']:12,}{row['us']['p25']:12.1f}{row['us']['median']:12.1f}"
            f"{row['algbw_gb_s']:12.3f}{row['busbw_gb_s']:12.3f}"
        )
    lines += ["", f"{method['time']}; bandwidths {method['bandwidths']}"]
    lines.append(", ".join(f"{name} {version}" for name, version in method["versions"].items()))
    return "\n".join(lines)
