"""horovodrun with ssh timeouts, an authenticated rendezvous server, and cheaper host discovery."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import MutableMapping, Sequence

from horovod_owt.parallel.interfaces import ipv4_address_of

DISCOVERY_LIMIT_S = 20  # for the discovery script, which is then run again
SSH_TIMEOUTS = "-o ConnectTimeout=20 -o ServerAliveInterval=5 -o ServerAliveCountMax=4"  # 20 s


def drop_invalid_names(env: MutableMapping[str, str] = os.environ) -> None:
    """Remove variables whose names a shell rejects, because horovodrun passes names unquoted to a shell.

    Values are quoted and need no change. Functions exported by bash (BASH_FUNC_module%%) have such names, and
    are of no use to ranks.
    """
    for name in [name for name in env if not re.fullmatch(r"[A-Za-z0-9_.+-]+", name)]:
        del env[name]


def _unabbreviated(word: str) -> str:
    """horovodrun also parses the command's options, and takes --timeline for an abbreviation of its own."""
    return "--horovod-timeline" if word == "--timeline" else word


def discover_without_python() -> None:
    """Make an elastic job's driver, in this process, start its discovery script directly.

    Horovod starts it through a Python process, every second, which takes 0.6 s of a core each time.
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

    drop_invalid_names()
    discover_without_python()
    remote.SSH_COMMAND_PREFIX += f" {SSH_TIMEOUTS}"
    if "--network-interfaces" in words:
        interface = words[words.index("--network-interfaces") + 1]
        ipv4_address_of(interface)  # raises a clear error if there is none
        guard_launcher(interface)
    # The cache of ssh checks is a pickle in ~/.horovod, and fails without a writable home.
    sys.argv = ["horovodrun", "--disable-cache", *map(_unabbreviated, words)]
    launch.run_commandline()
