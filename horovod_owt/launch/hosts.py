"""Host files with slots, in the formats of horovodrun and mpirun."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from horovod_owt.errors import ConfigError
from horovod_owt.files import read_user_text

LOOPBACK = re.compile(r"localhost(\..*)?|localhost[46]|ip6-localhost|127\.[\d.]+")


def read_hosts(file: Path) -> dict[str, int]:
    """Slots by host, from lines `HOST:SLOTS` or `HOST slots=SLOTS`, with # for comments, as discover-hosts.

    mpirun's `max_slots=` is ignored, as slots are never exceeded. Slots of a host on several lines add up.
    Raises ConfigError for invalid lines, and if some hosts are loopback names: other hosts cannot reach this
    one by them, and it may be listed twice.
    """
    lines = read_user_text(file, wanted="a file of HOST:SLOTS lines").splitlines()
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        words = re.sub(r"max[-_]slots=[0-9]*", "", line.partition("#")[0]).replace("slots=", ":")
        words = words.replace(" ", "").replace("\t", "")
        host, colon, slots = words.partition(":")
        if not words:
            continue
        if words.count(":") > 1:
            raise ConfigError(
                f"{file}, line {number}: {line[:60]!r}",
                wanted="a host name: horovodrun and mpirun take no IPv6 addresses",
                fix="give the address a name in DNS or /etc/hosts",
            )
        count = int(slots) if re.fullmatch(r"[0-9]{1,6}", slots) else 0
        if not (re.fullmatch(r"[\w.-]+", host) and colon and count):
            saw = f"{file}, line {number}: {line[:60]!r}"
            raise ConfigError(saw, wanted="HOST:SLOTS or HOST slots=SLOTS", fix="gpu07:4")
        hosts[host] = hosts.get(host, 0) + count
    if not hosts:
        raise ConfigError(f"no host in {file}", wanted="HOST:SLOTS lines")
    own = [host for host in hosts if LOOPBACK.fullmatch(host)]
    if 0 < len(own) < len(hosts):
        other = next(host for host in hosts if host not in own)
        raise ConfigError(
            f"{file} has {own[0]} beside {other}",
            wanted="each host once, by a name under which all others reach it",
            fix=f"{socket.gethostname()} instead of {own[0]}",
        )
    return hosts
