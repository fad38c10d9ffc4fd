"""Text output: file names that are not UTF-8, control characters, suggestions for typos, NaN in JSON.

File names are bytes; those that are not UTF-8 must neither be lost nor make a command fail. Python represents
such bytes as lone surrogates (PEP 383). JSON escapes and restores these; `encode` and the streams set up by
`tolerant_streams` write the original bytes.
"""

from __future__ import annotations

import codecs
import difflib
import json
import math
import re
import sys
from collections.abc import Iterable
from typing import Any

NAME_BYTES = "horovod_owt.name_bytes"  # an error handler, for names in any encoding
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def tolerant_streams() -> None:
    """Let stdout and stderr accept any file name, whatever the locale.

    On stdout a name keeps its bytes, so that it can be used; on stderr it is escaped, as Python does.
    """
    for stream, errors in ((sys.stdout, NAME_BYTES), (sys.stderr, "backslashreplace")):
        if hasattr(stream, "reconfigure"):  # None if closed
            # click takes ASCII for an unset locale: it would write UTF-8, with ? in names
            ascii_only = codecs.lookup(stream.encoding).name == "ascii"
            stream.reconfigure(encoding="utf-8" if ascii_only else None, errors=errors)


def one_line(text: str) -> str:
    """The text with control characters escaped: a file name may contain newlines or terminal codes."""
    return text if text.isprintable() else _CONTROL.sub(lambda found: _escaped(found[0]), text)


def without_terminal_codes(text: str) -> str:
    """`one_line` for each line of a text."""
    return "\n".join(map(one_line, text.split("\n")))


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word most similar to this one; empty if none is similar."""
    return next(iter(difflib.get_close_matches(str(word), list(known), n=1)), "")


def json_text(value: Any) -> str:
    """The value as one line of JSON, with null for NaN and infinity."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(without_nan(value))


def without_nan(value: Any) -> Any:
    """The value with None for NaN and infinity."""
    if isinstance(value, dict):
        return {str(key): without_nan(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def valid(text: str) -> str:
    """The text with invalid Unicode escaped, for libraries that reject it."""
    return text.encode(errors="backslashreplace").decode()


def encode(text: str) -> bytes:
    """The text as UTF-8; bytes of file names that are not UTF-8 are restored."""
    return text.encode(errors="surrogateescape")


def _name_bytes(error: UnicodeError) -> tuple[bytes | str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:  # a character that the stream's encoding lacks
        return codecs.lookup_error("backslashreplace")(error)


codecs.register_error(NAME_BYTES, _name_bytes)
