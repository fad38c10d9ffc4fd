"""Throughput of the input pipeline without a model: read, decode, crop, normalise.

Contenders take turns in short blocks. All of them prefetch, so a turn first takes the batches that are ready
without timing them, and it ends when the contender's threads are idle again.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from horovod_owt.bench.images import given_or_synthetic
from horovod_owt.bench.input_contenders import (
    open_cached,
    open_dali_reader,
    open_data_loader,
    open_decoder,
    open_ours,
    open_spdl,
)
from horovod_owt.data.workers import usable_cores
from horovod_owt.parallel import runtime
from horovod_owt.topology import require_single_process
from horovod_owt.train.prepare import Request, prepare_request

AHEAD = 8  # batches; no contender prefetches more
IDLE_SHARE = 0.1  # of the CPU time per second of a turn; on a GPU some threads are never quite idle
IDLE_LIMIT_S = 10.0

log = logging.getLogger(__name__)


def bench_input(
    data: Path | None, recipe: str | None, settings: tuple[str, ...], *, blocks: int, batches: int
) -> dict[str, Any]:
    """Time `blocks` turns of `batches` batches of each contender; raises ConfigError under a launcher."""
    require_single_process("bench input")
    with given_or_synthetic(data) as root, ExitStack() as keep:
        request = _with_threads(prepare_request(root, recipe, settings))
        contenders = _contenders(request, root, keep)
        turns: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        for block in range(blocks):
            for name, source in contenders.items():
                turns[name].append(_take_turn(source, batches))
            rates = (f"{name} {_rate(request, batches, rows[-1]):.0f}" for name, rows in turns.items())
            log.info("block %d of %d | images/s: %s", block + 1, blocks, ", ".join(rates))
        return _report(request, turns, batches)


def _with_threads(request: Request) -> Request:
    threads = request.cfg.decode_threads or usable_cores()
    return dataclasses.replace(request, cfg=dataclasses.replace(request.cfg, decode_threads=threads))


def _contenders(request: Request, root: Path, keep: ExitStack) -> dict[str, Iterator]:
    """Ours first. The DataLoader starts first: it forks its workers, and a fork would break threads."""
    cfg, store, device = request.cfg, request.folder.train, torch.device(request.device.name)
    loader = open_data_loader(cfg, store, device)
    next(loader)
    ours = "dali" if cfg.pipeline == "dali" else "torchvision-threads"
    contenders = {ours: open_ours(cfg, store, device, keep)}
    if cfg.pipeline == "dali" and not any((root / "train").glob("*.tar")):
        contenders["dali-file-reader"] = open_dali_reader(cfg, root / "train", device)
    contenders["torchvision"] = loader
    contenders["spdl"] = open_spdl(cfg, store, device, keep)
    contenders["decoding-only"] = open_decoder(cfg, root, cfg.decode_threads, keep)
    contenders["cached"] = open_cached(cfg, store, device, keep)
    return {name: source for name, source in contenders.items() if source is not None}


def _take_turn(source: Iterator, batches: int) -> tuple[float, float]:
    """Wall seconds, and CPU seconds of this process and its children, for `batches` batches."""
    for _ in range(AHEAD):
        next(source)
    cpu_before, start = _cpu_seconds(), time.perf_counter()
    for _ in range(batches):
        next(source)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall_s, cpu_s = time.perf_counter() - start, _cpu_seconds() - cpu_before
    _wait_until_idle(IDLE_SHARE * cpu_s / wall_s)
    return wall_s, cpu_s


def _cpu_seconds() -> float:
    process = psutil.Process()
    times = (p.cpu_times() for p in (process, *process.children(recursive=True)))
    return sum(t.user + t.system for t in times)


def _wait_until_idle(idle_cores: float) -> None:
    """Wait until all prefetch queues are full: until this process uses at most so many cores."""
    give_up, nap_s = time.monotonic() + IDLE_LIMIT_S, 0.1
    while time.monotonic() < give_up:
        before = _cpu_seconds()
        time.sleep(nap_s)
        if _cpu_seconds() - before <= idle_cores * nap_s:
            return


def _rate(request: Request, batches: int, turn: tuple[float, float]) -> float:
    return batches * request.cfg.batch / turn[0]


def _report(request: Request, turns: dict[str, list[tuple[float, float]]], batches: int) -> dict[str, Any]:
    cfg, rows = request.cfg, []
    for name, pairs in turns.items():
        wall, cpu = np.array(pairs).T
        p25, median, p75 = np.percentile(batches * cfg.batch / wall, [25, 50, 75])
        rows.append(
            {
                "pipeline": name,
                "images_per_s": median,
                "images_per_s_quartiles": [p25, p75],
                "cpu_s_per_image": float(np.median(cpu)) / (batches * cfg.batch),
            }
        )
    ours, *others = rows
    return {
        "rows": rows,
        "ratios": {
            f"{ours['pipeline']}/{other['pipeline']}": ours["images_per_s"] / other["images_per_s"]
            for other in others
        },
        "method": {
            "blocks": len(next(iter(turns.values()))),
            "batches_per_block": batches,
            "untimed_batches_per_block": AHEAD,
            "batch": cfg.batch,
            "image_size": cfg.image_size,
            "threads_or_workers": cfg.decode_threads,
            "training_images": len(request.folder.train),
            "device": request.device.name,
            "figures": "medians of blocks that alternate; CPU seconds of all threads and worker processes",
            "versions": runtime.versions(),
        },
    }


def format_input_report(report: dict[str, Any]) -> str:
    """The report as text."""
    method = report["method"]
    lines = [
        f"{method['training_images']} training images to {method['image_size']} px, batches of "
        f"{method['batch']}, {method['threads_or_workers']} threads or workers, {method['device']}",
        "",
        f"{'pipeline':18}{'images/s':>10}{'quartiles':>16}{'CPU ms/image':>14}",
    ]
    for row in report["rows"]:
        low, high = row["images_per_s_quartiles"]
        spread = f"{low:.0f} - {high:.0f}"
        cpu_ms = 1e3 * row["cpu_s_per_image"]
        lines.append(f"{row['pipeline']:18}{row['images_per_s']:10.0f}{spread:>16}{cpu_ms:14.2f}")
    lines += ["", *(f"{ratio:6.2f}  {name}" for name, ratio in report["ratios"].items()), ""]
    lines.append(
        f"{method['figures']}; {method['blocks']} blocks of {method['batches_per_block']} batches, "
        f"{method['untimed_batches_per_block']} untimed before each"
    )
    lines.append(", ".join(f"{name} {version}" for name, version in method["versions"].items()))
    return "\n".join(lines)
