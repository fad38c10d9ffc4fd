"""JSON objects on a TCP connection, one per line, of bounded length."""

from __future__ import annotations

import json
from typing import Any


def json_line(message: Any) -> bytes:
    """The message as JSON and a newline."""
    return json.dumps(message).encode() + b"\n"


class Lines:
    """Splits received bytes into messages; a line may have at most `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._rest = max_bytes, bytearray()

    def __bool__(self) -> bool:
        """Whether part of a line is buffered."""
        return bool(self._rest)

    def feed(self, arrived: bytes) -> list[Any]:
        """The messages completed by these bytes; ValueError for a line that is too long or not JSON."""
        *lines, last = arrived.split(b"\n")
        messages = []
        for line in lines:
            self._keep(line)
            messages.append(parsed(bytes(self._rest)))
            self._rest.clear()
        self._keep(last)
        return messages

    def _keep(self, part: bytes) -> None:
        if len(self._rest) + len(part) > self._max_bytes:
            self._rest.clear()
            raise ValueError(f"a line of more than {self._max_bytes} bytes")
        self._rest += part


def parsed(line: bytes) -> Any:
    """The value of a line; ValueError if it is not JSON."""
    try:
        return json.loads(line)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
