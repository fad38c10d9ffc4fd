"""horovodrun, whose ssh ends when its host is gone: by itself it waits for ever for one without power."""

from __future__ import annotations

import sys
from collections.abc import Sequence

ALIVE = "-o ConnectTimeout=20 -o ServerAliveInterval=5 -o ServerAliveCountMax=4"  # 20 s without an answer


def run(words: Sequence[str]) -> None:
    """What horovodrun does with these words; it ends the process by itself if the job fails."""
    from horovod.runner import launch
    from horovod.runner.util import remote

    remote.SSH_COMMAND_PREFIX += f" {ALIVE}"
    sys.argv = ["horovodrun", *words]
    launch.run_commandline()
