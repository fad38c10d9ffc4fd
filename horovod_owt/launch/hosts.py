"""Host files with slots, in the formats of horovodrun and mpirun."""

from __future__ import annotations

import re
from pathlib import Path

from horovod_owt.errors import ConfigError


def read_hosts(file: Path) -> dict[str, int]:
    """Read a host file, by the rules of discover-hosts: `HOST:SLOTS` or `HOST slots=SLOTS`, # for comments.

    The slots of a host on several lines, as PBS and Grid Engine write them, are added up.
    """
    try:
        lines = file.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}", wanted="a file of HOST:SLOTS lines") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].replace("slots=", ":").replace(" ", "").replace("\t", "")
        host, colon, slots = words.partition(":")
        if not words:
            continue
        if not (re.fullmatch(r"[\w.-]+", host) and colon and slots.isdecimal() and int(slots)):
            raise ConfigError(
                f"{file}, line {number}: {line!r}", wanted="HOST:SLOTS or HOST slots=SLOTS", fix="gpu07:4"
            )
        hosts[host] = hosts.get(host, 0) + int(slots)
    if not hosts:
        raise ConfigError(f"no host in {file}", wanted="HOST:SLOTS lines")
    return hosts
