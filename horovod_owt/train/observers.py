"""TensorBoard files and Prometheus metrics of a run, on rank 0."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horovod_owt.config import TrainConfig
from horovod_owt.data.batch import Batch
from horovod_owt.errors import ConfigError
from horovod_owt.parallel.heartbeat import Heartbeat
from horovod_owt.runs.folder import tensorboard_folder
from horovod_owt.runs.records import Start
from horovod_owt.train.rank_times import RankTimes

if TYPE_CHECKING:
    from horovod_owt.monitoring.run_metrics import RunMetrics
    from horovod_owt.monitoring.server import MetricsServer
    from horovod_owt.monitoring.tensorboard import TensorBoard

log = logging.getLogger(__name__)


class Observers:
    """Pass the run's records to TensorBoard and metrics. Inactive until `open`, which rank 0 calls."""

    def __init__(self) -> None:
        self._all: list[Any] = []  # objects with a method `record`
        self._server: MetricsServer | None = None
        self._metrics: RunMetrics | None = None
        self._tensorboard: TensorBoard | None = None

    def open(
        self,
        cfg: TrainConfig,
        run_dir: Path,
        start: Start,
        *,
        step: int,
        total_steps: int,
        checkpoint_steps: int,
        heartbeat: Heartbeat,
        resumes: bool,
    ) -> None:
        """Open the observers that the configuration asks for, after `step` steps of the run.

        Raises ConfigError if one can't be opened. If the port is in use, a run that `resumes` only warns: it
        may have moved to another host, unattended.
        """
        if cfg.tensorboard == "always" and not find_spec("tensorboard"):
            raise missing("tensorboard", "tensorboard=always", instead="tensorboard=never")
        if cfg.metrics_port and not find_spec("prometheus_client"):
            raise missing("prometheus_client", f"metrics_port={cfg.metrics_port}", instead="metrics_port=0")
        if cfg.metrics_port:
            from horovod_owt.monitoring.run_metrics import RunMetrics

            self._metrics = RunMetrics(
                run_dir,
                attempt=start.attempt,
                job_id=start.job_id,
                total_steps=total_steps,
                checkpoint_steps=checkpoint_steps,
                silent_ranks=heartbeat.silent,
            )
            self._all.append(self._metrics)
            self._serve(cfg, resumes)
        if cfg.tensorboard != "never" and find_spec("tensorboard"):
            from horovod_owt.monitoring.tensorboard import TensorBoard

            self._tensorboard = TensorBoard(
                tensorboard_folder(run_dir), first_step=step + 1, every=cfg.log_every
            )
            self._all.append(self._tensorboard)

    def record(self, kind: str, values: dict[str, Any]) -> None:
        for observer in self._all:
            observer.record(kind, values)

    def ranks(self, times: RankTimes | None) -> None:
        """Export where the time of a step went on all ranks."""
        if self._metrics is not None and times is not None:
            self._metrics.ranks(times)

    def show_first(self, batches: Iterable[Batch], step: int) -> Iterator[Batch]:
        """Yield the batches; the first one, of `step`, is also written to TensorBoard."""
        shown = self._tensorboard is None
        for batch in batches:
            if not shown:
                self._tensorboard.images(step, batch.images)
                shown = True
            yield batch

    def per_class(self, step: int, accuracy: Sequence[float], names: Sequence[str]) -> None:
        """Write the accuracy of each class, in percent, for the outputs that have a class name."""
        if self._tensorboard is not None:
            self._tensorboard.per_class(step, accuracy[: len(names)], names)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._server is not None:
            self._server.close()

    def _serve(self, cfg: TrainConfig, resumes: bool) -> None:
        from horovod_owt.monitoring.server import MetricsServer

        try:
            self._server = MetricsServer(self._metrics, address=cfg.metrics_address, port=cfg.metrics_port)
        except ConfigError as error:
            if not resumes:
                raise
            log.warning("no metrics: %s", error)
            return
        log.info("metrics on http://%s/metrics", self._server.place)


def missing(package: str, setting: str, *, instead: str) -> ConfigError:
    return ConfigError(
        f"{setting}, but {package} is not installed",
        wanted=package,
        fix=f'pip install "horovod_owt[metrics]" in the environment of rank 0, or --set {instead}',
    )
