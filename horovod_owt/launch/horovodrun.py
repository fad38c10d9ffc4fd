"""horovodrun with ssh timeouts; without them it waits for ever for a host that lost power."""

from __future__ import annotations

import sys
from collections.abc import Sequence

ALIVE = "-o ConnectTimeout=20 -o ServerAliveInterval=5 -o ServerAliveCountMax=4"  # 20 s


def run(words: Sequence[str]) -> None:
    """Run horovodrun with these arguments; it exits the process if the job fails."""
    from horovod.runner import launch
    from horovod.runner.util import remote

    remote.SSH_COMMAND_PREFIX += f" {ALIVE}"
    # Its cache of ssh checks is a pickle in ~/.horovod, and without a writable home it ends.
    sys.argv = ["horovodrun", "--disable-cache", *words]
    launch.run_commandline()
