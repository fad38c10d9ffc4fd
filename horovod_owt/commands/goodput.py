"""owt goodput: where the wall time of a run went."""

from __future__ import annotations

import json
from pathlib import Path

import click

from horovod_owt.commands.options import JSON_OPTION, UsersPath
from horovod_owt.errors import ConfigError
from horovod_owt.runs.goodput import STEP_PARTS, Goodput, goodput


@click.command("goodput")
@click.argument("run_dir", metavar="RUN", type=UsersPath())
@JSON_OPTION
def goodput_command(run_dir: Path, as_json: bool) -> None:
    """Print the goodput of RUN: the share of its wall time, over all attempts, spent on steps that counted.

    Steps that a later attempt repeated do not count. The lost time is itemised. The run may be in progress.

    \b
    Example:  owt goodput runs/first
    """
    found = goodput(run_dir)
    if found is None:
        there = "has no records with times" if run_dir.is_dir() else "does not exist"
        raise ConfigError(f"{run_dir} {there}", wanted="the --run-dir of a run")
    click.echo(json.dumps(found.to_dict()) if as_json else _text(found))


def _text(found: Goodput) -> str:
    attempts = f"{found.attempts} attempt{'s'[: found.attempts > 1]}"
    again = f", {found.steps_lost} steps lost" if found.steps_lost else ""
    lines = [
        f"{'wall time':16}{found.wall_s:12.1f} s           {attempts}, {found.steps} steps{again}",
        _line("goodput", found.share * found.wall_s, found.share),
    ]
    for part, share in found.shares().items():
        indented = f"  {part}" if part in STEP_PARTS else part
        lines.append(_line(indented, found.seconds[part], share))
    return "\n".join(lines)


def _line(name: str, seconds: float, share: float) -> str:
    return f"{name:16}{seconds:12.1f} s  {share:6.1%}"
