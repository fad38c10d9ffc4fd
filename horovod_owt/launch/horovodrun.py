"""horovodrun with ssh timeouts, as it waits for ever for a host that lost power, and a `Store`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from horovod_owt.parallel.interfaces import ipv4_address_of

ALIVE = "-o ConnectTimeout=20 -o ServerAliveInterval=5 -o ServerAliveCountMax=4"  # 20 s


def run(words: Sequence[str]) -> None:
    """Run horovodrun with these arguments; it exits the process if the job fails."""
    from horovod.runner import launch
    from horovod.runner.util import remote

    from horovod_owt.parallel.store import guard_launcher

    remote.SSH_COMMAND_PREFIX += f" {ALIVE}"
    if "--network-interfaces" in words:
        interface = words[words.index("--network-interfaces") + 1]
        ipv4_address_of(interface)  # or an error that says what is wanted
        guard_launcher(interface)
    # Its cache of ssh checks is a pickle in ~/.horovod, and without a writable home it ends.
    sys.argv = ["horovodrun", "--disable-cache", *words]
    launch.run_commandline()
