"""Checks of the data set and the run folder."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from time import monotonic, sleep
from typing import Any

from horovod_owt.config import TrainConfig
from horovod_owt.data.cache import MEMORY, expected_bytes
from horovod_owt.data.order import SampleOrder
from horovod_owt.data.room import room_in
from horovod_owt.data.staging import size_text
from horovod_owt.data.store import open_data_set
from horovod_owt.filesystem import free_space, unlink_quietly
from horovod_owt.perf.network import conv_parameters, fc_parameters
from horovod_owt.preflight.findings import Answer, Finding, agreement, at_least, hosts_of, or_inf

READ_S = 2.0  # duration of the read test
READERS = 4
CACHED_SIDE = TrainConfig(cache="ram").cached_side()
VISIBLE_S = 5.0  # delay after which a network file system shows a new file on other hosts
KEPT = TrainConfig.keep_checkpoints + 2  # the newest ones, the best, and the one being written
CHECKPOINT_BYTES = 2 * 4 * (conv_parameters() + fc_parameters(1000))  # weights and momentum, in fp32


def read(root: Path, seed: int) -> dict[str, Any]:
    """Fingerprint of the data set on this host, and its random read rate; raises DataError, OSError."""
    data = open_data_set(root)
    order, turns = SampleOrder(len(data.train), seed), itertools.count()
    start = monotonic()

    def some() -> tuple[int, int]:
        """Images and bytes read by one thread; `next` on the shared counter is atomic."""
        images = size = 0
        while monotonic() < start + READ_S:
            _, indices = order.at(next(turns), 1)
            size += len(data.train.read(int(indices[0])))
            images += 1
        return images, size

    with ThreadPoolExecutor(READERS) as readers:
        parts = [part.result() for part in [readers.submit(some) for _ in range(READERS)]]
    images, size = (sum(numbers) for numbers in zip(*parts, strict=True))
    seconds = max(1e-6, monotonic() - start)
    return {
        "fingerprint": data.fingerprint(),
        "images_per_s": images / seconds,
        "bytes_per_s": size / seconds,
        "cache_bytes": sum(expected_bytes(split, CACHED_SIDE) for split in (data.train, data.val)),
        "cache_room": room_in(MEMORY, memory=True) if MEMORY.is_dir() else 0,
    }


def judge_data(answers: Sequence[Answer]) -> list[Finding]:
    """The data is the same on every host, and none reads it at less than half the median rate."""
    same = [Answer(a.rank, a.host, {"set": a.value["fingerprint"]}) for a in answers]
    findings = agreement("data", same, fix="copy it to every host, or use a shared folder")
    middle = median(a.value["images_per_s"] for a in answers)
    slow = [a for a in answers if a.value["images_per_s"] < middle / 2]
    shown = slow or [min(answers, key=lambda a: a.value["images_per_s"])]
    saw = ", ".join(
        f"{a.value['images_per_s']:.0f} images/s ({a.value['bytes_per_s'] / 1e6:.0f} MB/s) on {a.host}"
        for a in shown
    )
    saw += f"; the median of {len(answers)} hosts is {middle:.0f}" if len(answers) > 1 else ""
    fix = "run `owt bench input DATA` there; check the mount, the disk, other jobs" if slow else ""
    findings.append(Finding("read rate", not slow, saw, "half the median", fix, hosts_of(slow)))
    return [*findings, _cache_finding(answers)]


def _cache_finding(answers: Sequence[Answer]) -> Finding:
    """Whether decoded images fit in memory. Never bad, because most runs use no cache."""
    least = min(answers, key=lambda a: a.value["cache_room"] - a.value["cache_bytes"])
    needed, room = least.value["cache_bytes"], least.value["cache_room"]
    fits = "fits" if needed <= room else "does not fit"
    return Finding(
        "cache=ram",
        True,
        f"{fits}: about {size_text(needed)} of decoded images at {CACHED_SIDE} px, {MEMORY} has room for "
        f"{size_text(room)} on {least.host}",
    )


def nearest_folder(run_dir: Path) -> Path:
    """The run folder, or the nearest parent that exists."""
    folder = Path(os.path.abspath(run_dir))
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def leave_token(run_dir: Path, token: str) -> str:
    """Create a file that other hosts should see; `take_token` removes it. Raises OSError."""
    folder = nearest_folder(run_dir)
    (folder / f".owt-preflight-{token}").write_text(token, encoding="utf-8")
    return str(folder)


def take_token(run_dir: Path, token: str) -> None:
    unlink_quietly(nearest_folder(run_dir) / f".owt-preflight-{token}")


def try_folder(run_dir: Path, token: str, rank: int) -> dict[str, Any]:
    """Whether this host can write to the run folder, sees rank 0's file, and how much space is free."""
    folder = nearest_folder(run_dir)
    own = folder / f".owt-preflight-{token}-{rank}"
    error_text = ""
    try:
        own.write_text(token, encoding="utf-8")
    except OSError as error:
        error_text = error.strerror or str(error)
    finally:
        unlink_quietly(own)
    deadline = monotonic() + VISIBLE_S
    while not (seen := (folder / f".owt-preflight-{token}").exists()) and monotonic() < deadline:
        os.listdir(folder)  # makes NFS ask the server again
        sleep(0.1)
    free_bytes, _ = free_space(folder)
    return {
        "folder": str(folder),
        "error": error_text,
        "shared": seen,
        "free_bytes": free_bytes,
    }


def judge_folder(answers: Sequence[Answer]) -> list[Finding]:
    """The run folder is writable, shared by all hosts, and has room for checkpoints of AlexNet-OWT."""
    folder = answers[0].value["folder"]
    closed = [a for a in answers if a.value["error"]]
    saw = ", ".join(f"{a.value['error']} on {a.host}" for a in closed[:4]) or f"{folder} is writable"
    fix = f"check `ls -ld {folder}` and `df {folder}` there, or use another --run-dir"
    findings = [
        Finding("run folder", not closed, saw, "writable", fix if closed else "", hosts_of(closed)),
        at_least(
            "room for checkpoints",
            [Answer(a.rank, a.host, or_inf(a.value["free_bytes"])) for a in answers],
            KEPT * CHECKPOINT_BYTES,
            unit="GB free",
            scale=1e9,
            wanted=f"{KEPT * CHECKPOINT_BYTES / 1e9:.1f} GB: {KEPT} of {CHECKPOINT_BYTES / 1e6:.0f} MB",
            fix="use another --run-dir, or a smaller keep_checkpoints",
        ),
    ]
    blind = [a for a in answers if not a.value["shared"]]
    if len(answers) > 1:
        saw = (
            f"rank 0's file is not visible on {', '.join(hosts_of(blind))}"
            if blind
            else "one folder on all hosts"
        )
        fix = "use a --run-dir on a file system that all hosts share" if blind else ""
        findings.append(Finding("shared run folder", not blind, saw, "the same folder", fix, hosts_of(blind)))
    return findings
