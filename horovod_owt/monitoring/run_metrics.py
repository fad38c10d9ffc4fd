"""Prometheus metrics of a run. A step only stores its record; the metrics are computed when scraped."""

from __future__ import annotations

import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import psutil
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from horovod_owt import __version__
from horovod_owt.filesystem import free_space
from horovod_owt.runs.checkpoints import list_checkpoints, step_of

RECENT = 20  # steps whose median predicts the time between checkpoints
MAX_NAMED = 32  # ranks that have their own series
SPREAD = ("min", "median", "max")
PARTS = (
    ("owt_rank_compute_seconds", "compute", "Own work of a rank"),
    ("owt_rank_data_wait_seconds", "data", "Wait of a rank for images"),
    ("owt_rank_communication_seconds", "communication", "Wait of a rank for other ranks"),
)


class Rank(Protocol):
    """A rank that a metric names."""

    rank: int
    host: str


class Times(Protocol):
    """Where the time of a step went, on all ranks."""

    def spread(self, part: str) -> tuple[float, float, float]:
        """Minimum, median and maximum over the ranks, in seconds."""


class CheckpointOnDisk(NamedTuple):
    step: int
    size: int  # bytes


class RunMetrics(Collector):
    """Metrics from the records of a run. Scrapes, in another thread, only read what was stored."""

    def __init__(
        self,
        run_dir: Path,
        *,
        attempt: int,
        job_id: str | None,
        total_steps: int = 0,
        checkpoint_steps: int = 0,
        silent_ranks: Callable[[], Sequence[Rank]] = lambda: (),
    ) -> None:
        """`checkpoint_steps` is the number of steps between checkpoints, 0 if unknown.

        `silent_ranks` is called in each scrape.
        """
        self._run_dir, self._attempt = run_dir, attempt
        self._labels = {"run": run_dir.name, "job_id": job_id or "", "attempt": str(attempt)}
        self._total_steps, self._checkpoint_steps = total_steps, checkpoint_steps
        self._silent_ranks = silent_ranks
        self._started = time.time()
        self._step_ended = self._started
        self._newest: dict[str, Mapping[str, Any]] = {}  # record by kind
        self._recent_step_s: deque[float] = deque(maxlen=RECENT)
        self._counted: Counter[str] = Counter()
        self._slow: dict[tuple[int, str], Mapping[str, Any]] = {}  # by rank and what is slow
        self._times: Times | None = None
        self._loss_finite = True
        self._checkpoint = checkpoint_on_disk(run_dir)
        self._checkpoint_written = 0.0  # Unix time, by this host's clock: the file server's may be off
        self._measured_interval_s = 0.0
        self._grad_norm: float | None = None  # of the last step in which it was measured
        self._process = psutil.Process()

    def record(self, kind: str, values: Mapping[str, Any]) -> None:
        """Store a record of the run."""
        self._newest[kind] = values
        if "grad_norm" in values:
            self._grad_norm = values["grad_norm"]
        if kind == "step":
            self._step_ended = time.time()
            self._recent_step_s.append(values["step_ms"] / 1e3)
            self._counted["bad images"] += values.get("bad_images", 0)
        elif kind == "checkpoint":
            self._checkpoint = checkpoint_on_disk(self._run_dir)
            before, self._checkpoint_written = self._checkpoint_written, time.time()
            if before:
                self._measured_interval_s = self._checkpoint_written - before
        elif kind == "straggler":
            slow = {**self._slow, (values["rank"], values["what"]): values}
            self._slow = {key: each for key, each in slow.items() if not each["recovered"]}
        elif kind == "fault":
            self._counted["faults"] += 1
            self._counted["failed checkpoints"] += "failures" in values
            self._loss_finite = self._loss_finite and not values.get("loss_not_finite", False)

    def ranks(self, times: Times) -> None:
        """Store where the time of a step went."""
        self._times = times

    def collect(self) -> Iterator[Metric]:
        yield from self._about_the_run()
        yield from self._about_steps()
        yield from self._about_ranks()
        yield from self._about_checkpoints()
        yield from self._about_the_host()

    def _about_the_run(self) -> Iterator[Metric]:
        run = self._newest.get("run", {})
        ranks = str(run.get("world_size", ""))
        yield self._gauge("owt_run_info", "The run; always 1.", 1, version=__version__, ranks=ranks)
        yield self._counter("owt_restarts", "Earlier attempts of the run.", self._attempt - 1)
        yield self._counter("owt_faults", "Fault records of this attempt.", self._counted["faults"])
        validation = self._newest.get("validation")
        if validation:
            yield self._gauge("owt_validation_top1_percent", "Of the last validation.", validation["top1"])
            yield self._gauge("owt_validation_top5_percent", "Of the last validation.", validation["top5"])
            yield self._gauge("owt_validation_loss", "Of the last validation.", validation["loss"])

    def _about_steps(self) -> Iterator[Metric]:
        step = self._newest.get("step")
        yield self._gauge(
            "owt_last_step_timestamp_seconds",
            "End of the last step, Unix time; before the first one, the start of the attempt.",
            self._step_ended,
        )
        yield self._gauge("owt_planned_steps", "Steps of the whole run.", self._total_steps)
        yield self._gauge(
            "owt_loss_finite", "0 once a loss is NaN or infinite, which ends the run.", int(self._loss_finite)
        )
        yield self._counter("owt_bad_images", "Bad images skipped.", self._counted["bad images"])
        first = self._newest.get("run", {}).get("first_step", 0)
        done = step["step"] if step else first
        yield self._counter("owt_steps", "Optimizer updates since the start of the run.", done)
        if step is None:
            return
        yield self._gauge("owt_epoch", "Passes over the training set.", step["epoch"])
        yield self._gauge("owt_loss", "Training loss of the last step.", step["loss"])
        if self._grad_norm is not None:
            yield self._gauge("owt_gradient_norm", "When it was measured last.", self._grad_norm)
        yield self._gauge("owt_learning_rate", "Of the last step.", step["lr"])
        yield self._gauge("owt_images_per_second", "Of all ranks, in the last step.", step["images_per_s"])
        yield self._gauge("owt_step_seconds", "Duration of the last step.", step["step_ms"] / 1e3)

    def _about_ranks(self) -> Iterator[Metric]:
        for name, part, text in PARTS if self._times else ():
            spread = zip(({"stat": stat} for stat in SPREAD), self._times.spread(part), strict=True)
            yield self._metric("gauge", name, f"{text} in a step: the spread over the ranks.", spread)
        silent = [{"rank": str(peer.rank), "host": peer.host} for peer in self._silent_ranks()]
        yield self._named("owt_silent_rank", "1 for a rank without a heartbeat.", silent)
        slow = [{key: str(one[key]) for key in ("rank", "host", "what")} for one in self._slow.values()]
        yield self._named("owt_slow_rank", "1 for a rank whose own work holds up the others.", slow)

    def _about_checkpoints(self) -> Iterator[Metric]:
        newest = self._checkpoint
        yield self._gauge(
            "owt_checkpoint_age_seconds",
            "Since the newest checkpoint or the start of the attempt, whichever is later.",
            time.time() - (self._checkpoint_written or self._started),
        )
        yield self._counter(
            "owt_checkpoint_failures", "Checkpoints not written.", self._counted["failed checkpoints"]
        )
        if newest:
            yield self._gauge("owt_checkpoint_step", "Step of the newest checkpoint.", newest.step)
            yield self._gauge("owt_checkpoint_size_bytes", "Of the newest checkpoint.", newest.size)
        if interval_s := self._checkpoint_interval_s():
            yield self._gauge(
                "owt_checkpoint_interval_seconds", "Expected time between two checkpoints.", interval_s
            )

    def _checkpoint_interval_s(self) -> float:
        """The steps between checkpoints at recent speed, or the last interval if longer; 0 if unknown.

        Only the measured interval includes time between steps, such as validation.
        """
        recent = list(self._recent_step_s)
        if not recent or not self._checkpoint_steps:
            return 0.0
        return max(self._checkpoint_steps * statistics.median(recent), self._measured_interval_s)

    def _about_the_host(self) -> Iterator[Metric]:
        with suppress(OSError):  # the disk may be gone, but the other metrics are still useful
            free, _ = free_space(self._run_dir)
            if free is not None:
                yield self._gauge("owt_disk_free_bytes", "Free for the user, under the run folder.", free)
        memory = self._process.memory_info().rss
        yield self._gauge("owt_resident_memory_bytes", "Of this process, rank 0.", memory)

    def _gauge(self, name: str, text: str, value: float, **labels: str) -> Metric:
        return self._metric("gauge", name, text, [(labels, value)])

    def _counter(self, name: str, text: str, value: float) -> Metric:
        """A counter, exported as NAME_total."""
        return self._metric("counter", name, text, [({}, value)])

    def _named(self, name: str, text: str, ranks: Sequence[Mapping[str, str]]) -> Metric:
        return self._metric("gauge", name, text, [(labels, 1) for labels in ranks[:MAX_NAMED]])

    def _metric(
        self, kind: str, name: str, text: str, samples: Iterable[tuple[Mapping[str, str], float]]
    ) -> Metric:
        """A metric whose samples have the labels of the run and their own."""
        metric = Metric(name, text, kind)
        suffix = "_total" if kind == "counter" else ""
        for labels, value in samples:
            metric.add_sample(name + suffix, {**self._labels, **labels}, value)
        return metric


def checkpoint_on_disk(run_dir: Path) -> CheckpointOnDisk | None:
    """The newest checkpoint of a run, if one can be found."""
    with suppress(OSError):
        for folder in list_checkpoints(run_dir):
            with suppress(OSError):  # it is being removed
                size = sum(file.stat().st_size for file in folder.iterdir())
                return CheckpointOnDisk(step_of(folder), size)
    return None
