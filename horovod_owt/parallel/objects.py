"""Python values as JSON, to send to other ranks: unlike a pickle, what arrives cannot run code.

Besides JSON's types: tuples (named tuples become plain ones), bytes, paths, dicts with any keys, NaN and
infinity, text that is not valid UTF-8, NumPy numbers (which become Python's), OwtErrors, and one dataclass,
given by the receiver.
"""

from __future__ import annotations

import dataclasses
import json
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from horovod_owt import errors
from horovod_owt.errors import OwtError

TAG = "="  # the only key of a JSON object that encodes another type, or a dict that has this key


def to_json(value: Any) -> str:
    """`value` as JSON; TypeError for an unsupported type."""
    return json.dumps(_plain(value))


def from_json(text: str, kind: type | None = None) -> Any:
    """The value that `to_json` encoded; `kind` is the class of its dataclasses. ValueError if invalid."""
    try:
        return _value(json.loads(text), kind)
    except (TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"not a value from another rank: {error}") from None


def _plain(value: Any) -> Any:
    match value:
        case None | bool() | str():
            return value
        case Integral():
            return int(value)
        case Real():
            return float(value)
        case list():
            return [_plain(each) for each in value]
        case dict() if TAG not in value and all(type(key) is str for key in value):
            return {key: _plain(each) for key, each in value.items()}
        case dict():
            return {TAG: ["dict", [[_plain(key), _plain(each)] for key, each in value.items()]]}
        case tuple():
            return {TAG: ["tuple", [_plain(each) for each in value]]}
        case bytes():
            return {TAG: ["bytes", value.hex()]}
        case Path():
            return {TAG: ["path", str(value)]}
        case OwtError():
            return {TAG: ["error", [_name(value), value.saw, value.wanted, value.fix]]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {TAG: ["dataclass", _plain(fields)]}
    raise TypeError(f"a {type(value).__name__} cannot be sent to other ranks")


def _value(plain: Any, kind: type | None) -> Any:
    if isinstance(plain, list):
        return [_value(each, kind) for each in plain]
    if not isinstance(plain, dict):
        return plain
    if TAG not in plain:
        return {key: _value(each, kind) for key, each in plain.items()}
    name, content = plain[TAG]
    match name:
        case "dict":
            return {_value(key, kind): _value(each, kind) for key, each in content}
        case "tuple":
            return tuple(_value(each, kind) for each in content)
        case "bytes":
            return bytes.fromhex(content)
        case "path":
            return Path(content)
        case "error":
            return _error(*content)
        case "dataclass" if kind is not None:
            return kind(**_value(content, kind))
    raise ValueError(f"not a value from another rank: {name}")


def _name(error: OwtError) -> str:
    """The error's class in `errors`, or its nearest base class there."""
    return next(each.__name__ for each in type(error).__mro__ if each in vars(errors).values())


def _error(name: str, saw: str, wanted: str, fix: str) -> OwtError:
    kind = vars(errors).get(name)
    if not (isinstance(kind, type) and issubclass(kind, OwtError)):
        raise ValueError(f"not an error of ours: {name}")
    return kind(saw, wanted=wanted, fix=fix)
