"""Host files with slots, in the formats of horovodrun and mpirun."""

from __future__ import annotations

import re
from pathlib import Path

from horovod_owt.errors import ConfigError
from horovod_owt.files import read_user_text


def read_hosts(file: Path) -> dict[str, int]:
    """Read a host file, by the rules of discover-hosts: `HOST:SLOTS` or `HOST slots=SLOTS`, # for comments.

    The slots of a host on several lines, as PBS and Grid Engine write them, are added up.
    """
    lines = read_user_text(file, wanted="a file of HOST:SLOTS lines").splitlines()
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].replace("slots=", ":").replace(" ", "").replace("\t", "")
        host, colon, slots = words.partition(":")
        if not words:
            continue
        count = int(slots) if re.fullmatch(r"[0-9]{1,6}", slots) else 0
        if not (re.fullmatch(r"[\w.-]+", host) and colon and count):
            saw = f"{file}, line {number}: {line[:60]!r}"
            raise ConfigError(saw, wanted="HOST:SLOTS or HOST slots=SLOTS", fix="gpu07:4")
        hosts[host] = hosts.get(host, 0) + count
    if not hosts:
        raise ConfigError(f"no host in {file}", wanted="HOST:SLOTS lines")
    return hosts
