"""What this rank's main thread is doing, for the heartbeat and other threads to read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from time import monotonic


@dataclass
class Activity:
    """The current phase, or the collective being waited for; only the main thread writes it."""

    what: str = "computing"
    waiting: bool = False  # whether `what` is a collective in which this rank waits for others
    since: float = field(default_factory=monotonic)
    step: int = 0  # optimizer updates done
    annotate: Callable[[str], AbstractContextManager] = nullcontext  # a profiler's, around each phase

    @contextmanager
    def waiting_in(self, collective: str) -> Iterator[None]:
        with self._during(collective, True):
            yield

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with self._during(name, False):
            yield

    @contextmanager
    def _during(self, what: str, waiting: bool) -> Iterator[None]:
        before = self.what, self.waiting
        self.what, self.waiting, self.since = what, waiting, monotonic()
        try:
            with self.annotate(f"waiting for {what}" if waiting else what):
                yield
        finally:
            (self.what, self.waiting), self.since = before, monotonic()


now = Activity()  # of this process
