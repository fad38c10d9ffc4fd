"""Progress output of rank 0: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from horovod_owt.train.replica import StepReport

log = logging.getLogger(__name__)


class Progress:
    """Shows every `every`-th step: loss, images/s and the shares of the step spent waiting."""

    def __init__(self, *, total_steps: int, first_step: int, global_batch: int, every: int) -> None:
        self._total, self._global_batch, self._every = total_steps, global_batch, every
        self._since: list[StepReport] = []
        self._redirected = ExitStack()
        on_terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step") if on_terminal else None

    def step(self, step: int, epoch: float, lr: float, report: StepReport) -> None:
        """Report the end of step number `step` (the first is 1)."""
        self._since.append(report)
        if self._bar is not None:
            self._bar.update()
        if step % self._every and step != self._total:
            return
        mean = _mean_report(self._since)
        self._since = []
        images_per_s = self._global_batch / mean.step_s
        data, comm = mean.data_wait_s / mean.step_s, mean.exposed_comm_s / mean.step_s
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {mean.loss:.3f}, {images_per_s:.0f} img/s, data {data:.0%}, comm {comm:.0%}"
            )
            return
        log.info(
            "step %d/%d | epoch %.2f | loss %.3f | lr %.1e | %.0f img/s | "
            "step %.1f ms (data %.0f %%, comm %.0f %%)",
            step, self._total, epoch, mean.loss, lr, images_per_s, 1e3 * mean.step_s, 1e2 * data, 1e2 * comm,
        )  # fmt: skip

    def __enter__(self) -> Progress:
        if self._bar is not None:  # log lines go above the bar, not through it
            self._redirected.enter_context(logging_redirect_tqdm([logging.getLogger("horovod_owt")]))
        return self

    def __exit__(self, *_: object) -> None:
        self._redirected.close()
        if self._bar is not None:
            self._bar.close()


def _mean_report(reports: list[StepReport]) -> StepReport:
    def mean(name: str) -> float:
        return sum(getattr(report, name) for report in reports) / len(reports)

    return StepReport(
        loss=mean("loss"),
        stop_asked=False,
        step_s=mean("step_s"),
        data_wait_s=mean("data_wait_s"),
        exposed_comm_s=mean("exposed_comm_s"),
    )
