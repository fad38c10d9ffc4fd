"""The records that rank 0 writes during a run, and the requests that it receives."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from horovod_owt.config import TrainConfig
from horovod_owt.runs.folder import write_outcome
from horovod_owt.runs.opening import Opened, Resume, open_run_folder
from horovod_owt.runs.owner import Ownership
from horovod_owt.runs.records import MetricsLog, Start
from horovod_owt.train.hooks import Hook, check_hook
from horovod_owt.train.requests import FileRequests
from horovod_owt.train.stop import StopRequest


def open_run(
    run_dir: Path | None, cfg: TrainConfig, data: Mapping[str, Any], resume: Resume, ownership: Ownership
) -> Opened:
    """Check the hook and open the run folder, on rank 0; raises OwtError."""
    if cfg.hook:
        check_hook(cfg.hook)
    return open_run_folder(run_dir, cfg, data, resume, ownership)


class Journal:
    """metrics.jsonl, outcome.json, the hook, and requests through files, on rank 0."""

    def __init__(self, run_dir: Path, start: Start, cfg: TrainConfig, stop: StopRequest) -> None:
        """Raises ConfigError if the records cannot be written."""
        self._run_dir, self._start = run_dir, start
        self._metrics = MetricsLog(run_dir, start)
        self._hook = Hook(shlex.split(cfg.hook), run_dir, cfg.hook_limit_s) if cfg.hook else None
        self.requests = FileRequests(run_dir, stop)

    def record(self, kind: str, **values: Any) -> None:
        record = self._metrics.write(kind, **values)
        if kind == "checkpoint":
            self.requests.saved(values["step"])
        if self._hook is not None:
            self._hook.tell(record)
            if kind == "outcome":  # the process may exit immediately afterwards
                self._hook.close()

    def end(self, outcome: dict[str, Any]) -> None:
        """Record how the run ended."""
        write_outcome(self._run_dir, {**self._start.stamp(), **outcome})
        self.record("outcome", **outcome)
        self.requests.withdraw_all()

    def close(self) -> None:
        """Close the records; the hook still runs for queued events, if the ranks regroup."""
        if self._hook is not None:
            self._hook.leave()
        self._metrics.close()
