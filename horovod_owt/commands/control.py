"""owt stop, owt save: control a run through its folder, without the scheduler."""

from __future__ import annotations

from pathlib import Path

import click

from horovod_owt.commands.options import UsersPath
from horovod_owt.runs.control import SAVE, STOP, send_request, wait_for_checkpoint, wait_for_end

RUN_DIR = click.argument("run_dir", metavar="RUN", type=UsersPath())
WAIT = click.option("--wait", is_flag=True, help="Wait until it is done.")
TIME_LIMIT = click.option(
    "--time-limit",
    type=click.IntRange(min=1),
    default=600,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait.",
)


@click.command()
@RUN_DIR
@WAIT
@TIME_LIMIT
def stop(run_dir: Path, wait: bool, time_limit: int) -> None:
    """Stop the run in RUN at a checkpoint, after its current step; it is not restarted or requeued.

    The same as creating the file RUN/STOP, on any host that sees the folder. Starting it again resumes it.

    \b
    Example:  owt stop runs/first --wait
    """
    owner = send_request(run_dir, STOP)
    click.echo(f"asked {owner} to stop at a checkpoint", err=wait)
    if wait:
        click.echo(wait_for_end(run_dir, owner, time_limit))


@click.command()
@RUN_DIR
@WAIT
@TIME_LIMIT
def save(run_dir: Path, wait: bool, time_limit: int) -> None:
    """Have the run in RUN write a checkpoint after its current step, and continue.

    The same as creating the file RUN/SAVE, on any host that sees the folder.

    \b
    Example:  owt save runs/first --wait
    """
    owner = send_request(run_dir, SAVE)
    click.echo(f"asked {owner} for a checkpoint", err=wait)
    if wait:
        click.echo(str(wait_for_checkpoint(run_dir, owner, time_limit)))
