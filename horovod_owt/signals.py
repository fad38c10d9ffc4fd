"""Signals that this process was started to ignore."""

from __future__ import annotations

import signal
from collections.abc import Iterable

FROM_TERMINALS = (signal.SIGINT, signal.SIGHUP)


def heeded(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Those of `numbers` to set a handler for: the others are ignored, and stay so.

    `nohup` has HUP ignored. A script has INT ignored in `command &`, so that Ctrl-C ends only what the script
    has in the foreground. What no terminal sends is meant for this process, whatever a parent's `trap` says.
    """
    return [
        number
        for number in numbers
        if number not in FROM_TERMINALS or signal.getsignal(number) != signal.SIG_IGN
    ]


def end_at_once_on_ctrl_c() -> None:
    """Without Python's KeyboardInterrupt, which nobody hears while the process waits in a collective."""
    for number in heeded([signal.SIGINT]):
        signal.signal(number, signal.SIG_DFL)
