"""JSON objects on a TCP connection, one per line, of bounded length."""

from __future__ import annotations

import json
from typing import Any


def json_line(message: Any) -> bytes:
    """A message as it is sent: JSON and a newline."""
    return json.dumps(message).encode() + b"\n"


class Lines:
    """Splits what arrives into messages; keeps at most one line of `most` bytes."""

    def __init__(self, most: int) -> None:
        self._most, self._rest = most, bytearray()

    def __bool__(self) -> bool:
        """Whether part of a line has arrived."""
        return bool(self._rest)

    def feed(self, arrived: bytes) -> list[Any]:
        """The messages that are complete now; ValueError for a line that is too long or not JSON."""
        *lines, last = arrived.split(b"\n")
        messages = []
        for line in lines:
            self._keep(line)
            messages.append(parsed(bytes(self._rest)))
            self._rest.clear()
        self._keep(last)
        return messages

    def _keep(self, part: bytes) -> None:
        if len(self._rest) + len(part) > self._most:
            self._rest.clear()
            raise ValueError(f"a line of more than {self._most} bytes")
        self._rest += part


def parsed(line: bytes) -> Any:
    """The value of a line; ValueError if it is not JSON."""
    try:
        return json.loads(line)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
