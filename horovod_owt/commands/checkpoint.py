"""owt checkpoint: list and verify checkpoints."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from horovod_owt.commands.options import JSON_OPTION, UsersPath
from horovod_owt.errors import ConfigError, ProblemFound, RunError
from horovod_owt.runs.checkpoints import find_fault, list_checkpoints, read_best, read_state, step_of

RUN_DIR = click.argument("run_dir", type=UsersPath())


@click.group()
def checkpoint() -> None:
    """List or verify the checkpoints of a run.

    \b
    Example:  owt checkpoint verify runs/first
    """


@checkpoint.command("list")
@RUN_DIR
@JSON_OPTION
def list_(run_dir: Path, as_json: bool) -> None:
    """List the checkpoints of RUN_DIR, newest first: step, epoch, size, time, and the best one.

    \b
    Example:  owt checkpoint list runs/first
    """
    rows = [row for folder in _folders(run_dir) if (row := _row(folder, run_dir))]
    if as_json:
        click.echo(json.dumps({"checkpoints": rows}))
        return
    click.echo(f"{'step':>10}  {'epoch':>8}  {'MB':>7}  {'written':19}")
    for row in rows:
        best = f"  best: top-1 {row['best_top1']:.2f} %" if "best_top1" in row else ""
        epoch = "?" if row["epoch"] is None else f"{row['epoch']:.2f}"
        size = "?" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f}"
        click.echo(f"{row['step']:10}  {epoch:>8}  {size:>7}  {row['written'] or '?':19}{best}".rstrip())


@checkpoint.command()
@RUN_DIR
@JSON_OPTION
def verify(run_dir: Path, as_json: bool) -> None:
    """Verify every file of every checkpoint of RUN_DIR by its sha256. Exit code 3 if one is damaged.

    \b
    Example:  owt checkpoint verify runs/first
    """
    rows = []
    for folder in _folders(run_dir):
        fault = _fault(folder)
        if fault and not folder.exists():
            continue  # deleted by the run meanwhile
        rows.append({"path": str(folder), "fault": fault})
        if not as_json:
            click.echo(f"{folder.name}  {fault or 'whole'}")
    if as_json:
        click.echo(json.dumps({"checkpoints": rows}))
    if bad := sum(bool(row["fault"]) for row in rows):
        raise ProblemFound(
            f"{bad} of {len(rows)} checkpoints damaged",
            fix="none needed: --resume auto skips damaged ones",
        )


def _fault(folder: Path) -> str:
    try:
        return find_fault(folder)
    except RunError as error:  # of the disk: the others are verified all the same
        return f"unreadable: {error}"


def _folders(run_dir: Path) -> list[Path]:
    folders = list_checkpoints(run_dir)
    if not folders:
        there = "has no checkpoints" if run_dir.is_dir() else "does not exist"
        raise ConfigError(f"{run_dir} {there}", wanted="the --run-dir of a run")
    return folders


def _row(folder: Path, run_dir: Path) -> dict[str, Any] | None:
    """A row from names, sizes and state.json; tensors are not read. None if the run has just deleted it."""
    try:
        epoch = float(read_state(folder)["epoch"])
    except (OSError, ValueError, KeyError, TypeError):
        epoch = None
    try:
        size = sum(path.stat().st_size for path in folder.iterdir())
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(folder.stat().st_mtime))
    except FileNotFoundError:
        return None
    except OSError:  # closed to this user, or a file: the others are listed all the same
        size = written = None
    row = {
        "step": step_of(folder),
        "epoch": epoch,
        "bytes": size,
        "written": written,
        "path": str(folder),
    }
    best = read_best(run_dir)
    return row | ({"best_top1": best["top1"]} if best.get("step") == row["step"] else {})
