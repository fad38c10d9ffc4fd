"""Profile some steps with torch's profiler: a trace for Perfetto and a table of operations, for each rank."""

from __future__ import annotations

import gzip
import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path

from torch.profiler import DeviceType, ProfilerActivity, profile, record_function, schedule

from horovod_owt.errors import ConfigError
from horovod_owt.files import atomic_file
from horovod_owt.filesystem import temporary_folder
from horovod_owt.parallel.activity import now
from horovod_owt.parallel.runtime import World
from horovod_owt.runs.folder import profile_table, profile_trace

log = logging.getLogger(__name__)

SKIP = 4  # warm-up steps; the profiler itself warms up in the next one
OPERATIONS = 10  # in the table
BUCKET_NUMBER = re.compile(r"\.\d+$")  # in the names of the collectives on gradient buckets
MAX_LETTERS = 100  # of a kernel's name, which may have long template arguments


class Profile:
    """Profiles `steps` steps of this rank after the first ones; nothing if `steps` is 0."""

    def __init__(self, steps: int, world: World, run_dir: Path) -> None:
        self._steps, self._world, self._run_dir = steps, world, run_dir
        self._on_gpu = world.device.type == "cuda"
        self._profiler: profile | None = None
        self._done = 0  # steps

    def __enter__(self) -> Profile:
        if self._steps:
            activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self._on_gpu]
            self._profiler = profile(
                activities=activities,
                schedule=schedule(wait=SKIP, warmup=1, active=self._steps, repeat=1),
                on_trace_ready=self._write,
            )
            self._profiler.start()
            now.annotate = record_function
        return self

    def step(self) -> None:
        """Call it after each step."""
        if self._profiler is None:
            return
        self._done += 1
        self._profiler.step()
        if self._done == SKIP + 1 + self._steps:
            self._stop()

    def __exit__(self, *_: object) -> None:
        """Stop early if there are fewer steps."""
        if self._profiler is not None:
            if self._done <= SKIP + 1 and self._world.is_root:
                log.warning("no profile: it begins after %d steps, and there were %d", SKIP + 1, self._done)
            self._stop()

    def _stop(self) -> None:
        now.annotate = nullcontext
        profiler, self._profiler = self._profiler, None
        profiler.stop()

    def _write(self, profiler: profile) -> None:
        steps = self._done - SKIP - 1
        if steps < 1:
            return
        rank, trace = self._world.rank, profile_trace(self._run_dir, self._world.rank)
        table = table_of(profiler.key_averages(), steps=steps, on_gpu=self._on_gpu)
        try:
            trace.parent.mkdir(exist_ok=True)
            write_trace(profiler, trace)
            with atomic_file(profile_table(self._run_dir, rank)) as file:
                file.write(table.encode())
        except (OSError, ConfigError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            log.warning("%s: %s; no profile of this rank", trace, reason)
            return
        if self._world.is_root:
            log.info("profile of %d steps in %s\n%s", steps, trace.parent, table.rstrip())


def write_trace(profiler: profile, file: Path) -> None:
    with temporary_folder("owt-profile-") as scratch:
        plain = scratch / "trace.json"
        profiler.export_chrome_trace(str(plain))
        with plain.open("rb") as trace, atomic_file(file) as out, gzip.open(out, "wb") as packed:
            while block := trace.read(1 << 20):
                packed.write(block)


def table_of(operations: Iterable, *, steps: int, on_gpu: bool) -> str:
    """A table of the most expensive operations by self time; on a GPU, of kernels and copies."""
    own_us: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for each in _on_gpu(list(operations)) if on_gpu else operations:
        if not each.key.startswith("ProfilerStep"):
            name = BUCKET_NUMBER.sub("", each.key)[:MAX_LETTERS]
            own_us[name] += _own_us(each, on_gpu)
            calls[name] += each.count
    total = own_us.total() or 1
    rows = [f"{'share':>6}  {'ms/step':>9}  {'calls/step':>10}  operation"]
    for name, us in own_us.most_common(OPERATIONS):
        rows.append(f"{us / total:6.1%}  {us / 1e3 / steps:9.2f}  {calls[name] / steps:10.1f}  {name}")
    return "\n".join(rows) + "\n"


def _on_gpu(operations: Sequence) -> list:
    """The kernels and copies that ran on the GPU.

    The profiler also lists their time under the operations that launched them, and annotations under both.
    """
    of_host = {each.key for each in operations if each.device_type == DeviceType.CPU}
    return [each for each in operations if each.device_type != DeviceType.CPU and each.key not in of_host]


def _own_us(event: object, on_gpu: bool) -> float:
    if not on_gpu:
        return event.self_cpu_time_total
    new_name = hasattr(event, "self_device_time_total")  # since torch 2.4
    return event.self_device_time_total if new_name else event.self_cuda_time_total
