"""Stop requests: signals, and the file STOP in the run folder."""

from __future__ import annotations

import signal

from horovod_owt.runs.control import STOP
from horovod_owt.signals import heeded

# Slurm sends TERM at a time limit or preemption, and the signal that --signal selects. A terminal that closes
# sends HUP.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Records stop signals while it is entered, so that the current step can finish.

    A second SIGINT ends the process at once, as a user who presses Ctrl-C twice expects.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.by_file = False  # set by the thread that checks for the file
        self._before: dict[signal.Signals, object] = {}

    @property
    def asked(self) -> bool:
        return self.by_file or self.signal is not None

    @property
    def by(self) -> str:
        """The source: STOP for the file, which has precedence, or the name of the signal; else empty."""
        return STOP if self.by_file else self.signal.name if self.signal else ""

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in heeded(STOP_SIGNALS)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        self.signal = signal.Signals(number)
        if signal.SIGINT in self._before:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
