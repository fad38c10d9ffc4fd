"""horovodrun with ssh timeouts, as it waits for ever for a lost host, a `Store`, and cheap host discovery."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import MutableMapping, Sequence

from horovod_owt.parallel.interfaces import ipv4_address_of

DISCOVERY_LIMIT_S = 20  # then it is asked again
ALIVE = "-o ConnectTimeout=20 -o ServerAliveInterval=5 -o ServerAliveCountMax=4"  # 20 s


def drop_unspeakable(env: MutableMapping[str, str] = os.environ) -> None:
    """Remove variables whose names a shell would not take: horovodrun passes names unquoted to one.

    Their values, quoted, arrive as they are, of several lines or not UTF-8. Functions that bash exports
    (BASH_FUNC_module%%) are among those names, and of no use to ranks.
    """
    for name in [name for name in env if not re.fullmatch(r"[A-Za-z0-9_.+-]+", name)]:
        del env[name]


def _spelled_out(word: str) -> str:
    """horovodrun reads the options of the command too, and takes this one for the start of its own."""
    return "--horovod-timeline" if word == "--timeline" else word


def discover_without_python() -> None:
    """Make an elastic job's driver, in this process, start its discovery script as a process of its own.

    Horovod starts a Python process around it, every second: 0.6 s of a core, as long as the job lasts.
    """
    from horovod.runner.elastic.discovery import HostDiscoveryScript

    def hosts_now(self: HostDiscoveryScript) -> str:
        argv = shlex.split(self._discovery_script)
        done = subprocess.run(
            argv,
            stdout=subprocess.PIPE,
            check=True,
            timeout=DISCOVERY_LIMIT_S,
            encoding="utf-8",
            errors="replace",
        )
        return done.stdout

    HostDiscoveryScript._execute_discovery_script = hosts_now


def run(words: Sequence[str]) -> None:
    """Run horovodrun with these arguments; it exits the process if the job fails."""
    from horovod.runner import launch
    from horovod.runner.util import remote

    from horovod_owt.parallel.store import guard_launcher

    drop_unspeakable()
    discover_without_python()
    remote.SSH_COMMAND_PREFIX += f" {ALIVE}"
    if "--network-interfaces" in words:
        interface = words[words.index("--network-interfaces") + 1]
        ipv4_address_of(interface)  # or an error that says what is wanted
        guard_launcher(interface)
    # Its cache of ssh checks is a pickle in ~/.horovod, and without a writable home it ends.
    sys.argv = ["horovodrun", "--disable-cache", *map(_spelled_out, words)]
    launch.run_commandline()
