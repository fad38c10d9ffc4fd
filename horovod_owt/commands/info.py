"""owt info: what a bug report needs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click

from horovod_owt.commands.options import JSON_OPTION


@click.command()
@JSON_OPTION
def info(as_json: bool) -> None:
    """Print what a bug report needs: versions, Horovod, devices, host, limits, network.

    \b
    Examples:  owt info
               mpirun -np 1 --host gpu07 owt info --json

    Works without a data set or a GPU, and where torch or Horovod is missing or broken: the field then says
    why. Host names and addresses are shown; home folders are shown as ~. Of the environment, only a fixed
    list of variables that hold no secrets is shown.
    """
    from horovod_owt.preflight.info import information

    found = information()
    click.echo(json.dumps(found, indent=1) if as_json else "\n".join(_lines(found)))


def _lines(found: dict[str, Any], indent: str = "") -> Iterator[str]:
    width = max((len(key) for key, value in found.items() if not _nested(value)), default=0)
    for key, value in found.items():
        if not _nested(value):
            yield f"{indent}{key:{width}}  {_cell(value)}"
            continue
        yield f"{indent}{key}:"
        for each in value if isinstance(value, list) else [value]:
            if isinstance(value, list):
                yield f"{indent}  " + "  ".join(f"{name}={_cell(part)}" for name, part in each.items())
            else:
                yield from _lines(each, f"{indent}  ")


def _nested(value: Any) -> bool:
    rows = isinstance(value, list) and value and isinstance(value[0], dict)
    return rows or (isinstance(value, dict) and bool(value))


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return "-" if value in (None, "", {}) else str(value)
