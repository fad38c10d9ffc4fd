"""owt job: jobs on a Slurm cluster."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from horovod_owt.commands.options import JSON_OPTION, UsersPath
from horovod_owt.slurm.spec import AUTO, KINDS, LAUNCHERS, JobSpec, option_of, sbatch_fields

if TYPE_CHECKING:
    from horovod_owt.slurm.status import JobStatus

JOB_ID = click.argument("job_id", metavar="JOB")


@click.group()
def job() -> None:
    """Submit and control jobs on a Slurm cluster.

    \b
    Example:  owt job submit --nodes 8 --gpus-per-node 4 --time 24:00:00 /data/imagenet -- --set batch=256
              owt job status 1234
    """


def job_options(body: Callable) -> Callable:
    """The options that describe a job; `body` gets them as one JobSpec."""

    @functools.wraps(body)
    def with_spec(kind: str, owt_args: tuple[str, ...], dry_run: bool | None = None, **options) -> None:
        values = {name: value for name, value in options.items() if value is not None}
        spec = JobSpec(kind=kind, owt_args=owt_args, **values)
        body(spec) if dry_run is None else body(spec, dry_run)

    decorators = [
        click.argument("owt_args", nargs=-1, metavar="[DATA] [-- OPTIONS OF OWT]", type=click.UNPROCESSED),
        click.option(
            "--kind", type=click.Choice(list(KINDS)), default="train", show_default=True, help="What to run."
        ),
        *(_sbatch_option(name, text) for name, text in sbatch_fields().items()),
        click.option(
            "--sbatch",
            "extra",
            multiple=True,
            metavar="--NAME=VALUE",
            help="Another sbatch option; may be repeated.",
        ),
        click.option(
            "--module",
            "modules",
            multiple=True,
            metavar="NAME",
            help="Load this environment module; may be repeated.",
        ),
        click.option("--venv", help="Virtual environment to activate.  [default: the environment of sbatch]"),
        click.option("--container-image", help="Run the ranks in this image (Pyxis)."),
        click.option("--apptainer", metavar="IMAGE", help="Run the ranks in this image (Apptainer)."),
        click.option(
            "--container-mounts",
            metavar="SRC:DST,...",
            help="Folders of the nodes that the container shows: DATA, the run folder.",
        ),
        click.option(
            "--launcher", type=click.Choice(LAUNCHERS), help="Launcher of the ranks.  [default: auto]"
        ),
        click.option(
            "--interface",
            metavar="NAME",
            help="Network interface of the ranks.  [default: the one that reaches the job's nodes]",
        ),
        click.option(
            "--min-ranks",
            type=click.IntRange(min=1),
            help="Elastic: the attempt ends if fewer ranks are left.  [default: half of the ranks]",
        ),
        click.option(
            "--max-restarts",
            type=click.IntRange(min=0),
            help=f"Requeue a stopped job at most this often.  [default: {JobSpec.max_restarts}]",
        ),
    ]
    return functools.reduce(lambda decorated, decorate: decorate(decorated), reversed(decorators), with_spec)


def _sbatch_option(name: str, text: str) -> Callable:
    """An option with sbatch's name; if it is not given, JobSpec's default applies."""
    is_flag = isinstance(getattr(JobSpec, name), bool)
    return click.option(option_of(name), is_flag=is_flag, default=None, help=text)


@job.command()
@job_options
def render(spec: JobSpec) -> None:
    """Print the job's sbatch script; without DATA, pass DATA and options to sbatch after the script.

    \b
    Example:  owt job render --nodes 8 --gpus-per-node 4 > train.sbatch
              sbatch train.sbatch /data/imagenet --run-dir runs/first
    """
    from horovod_owt.slurm.script import render

    click.echo(render(spec), nl=False)


@job.command()
@job_options
@click.option("--dry-run", is_flag=True, help="Print the script instead of submitting it.")
def submit(spec: JobSpec, dry_run: bool) -> None:
    """Submit a job and print its id.

    \b
    Examples:  owt job submit --nodes 8 --gpus-per-node 4 /data/imagenet -- --run-dir runs/first
               owt job submit --array 0-4 --gpus-per-node 4 /data/imagenet -- --set seed={task}
    """
    from horovod_owt.slurm.client import submit
    from horovod_owt.slurm.script import render

    if not spec.owt_args and spec.restarts:
        raise click.UsageError("missing DATA")
    script = render(spec)
    click.echo(script if dry_run else submit(script), nl=not dry_run)


@job.command()
@JOB_ID
@click.option("--run-dir", type=UsersPath(), help="The job's run folder, if Slurm has forgotten the job.")
@JSON_OPTION
def status(job_id: str, run_dir: Path | None, as_json: bool) -> None:
    """Print the state and progress of job JOB (1234, or 1234_2 of an array).

    \b
    Example:  owt job status 1234 --json
    """
    from horovod_owt.slurm.status import job_status

    found = job_status(job_id, run_dir)
    click.echo(json.dumps(found.to_dict()) if as_json else _text(found))


@job.command()
@JOB_ID
def cancel(job_id: str) -> None:
    """Cancel job JOB; the run stops at a checkpoint if the site's KillWait is long enough.

    \b
    Example:  owt job cancel 1234
    """
    from horovod_owt.slurm.client import cancel

    cancel(job_id)


@job.command()
@JOB_ID
def nodes(job_id: str) -> None:
    """Print the current nodes of job JOB, one per line; an elastic job may have lost some.

    \b
    Example:  owt job nodes 1234
    """
    from horovod_owt.slurm.nodes import nodes_of

    for host in nodes_of(job_id):
        click.echo(host)


@job.command(hidden=True)
@click.option("--launcher", type=click.Choice(LAUNCHERS), default=AUTO)
@click.option("--interface", default=JobSpec.interface)
@click.option("--max-restarts", type=int, default=JobSpec.max_restarts)
@click.option("--elastic", is_flag=True, help="Elastic training; ranks are started by ssh.")
@click.option("--min-ranks", type=int, default=JobSpec.min_ranks, help="Of an elastic job.  [default: half]")
@click.option("--container-image", default="")
@click.option("--apptainer", default="")
@click.option("--container-mounts", default="")
@click.argument("command", nargs=-1, required=True, metavar="-- train DATA [...]")
def run(
    command: tuple[str, ...], container_image: str, apptainer: str, container_mounts: str, **options
) -> None:
    """The batch process of a job: start the ranks, and requeue the job if it can continue."""
    from horovod_owt.slurm.batch import run_job
    from horovod_owt.slurm.container import Container

    container = Container(container_image, apptainer, container_mounts)
    sys.exit(run_job(command, container=container, **options))


@job.command(hidden=True, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def rank(command: tuple[str, ...]) -> None:
    """Run by srun in a job without MPI: set Horovod's Gloo variables, then exec COMMAND."""
    from horovod_owt.slurm.gloo_rank import become_rank

    become_rank(command)


def _text(found: JobStatus) -> str:
    shown = {name: "-" if value is None else value for name, value in found.to_dict().items()}
    return "\n".join(f"{name.replace('_', ' '):12}  {value}" for name, value in shown.items())
