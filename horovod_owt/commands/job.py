"""owt job: jobs of a Slurm cluster, from its login node."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from horovod_owt.commands.options import JSON_OPTION
from horovod_owt.slurm.spec import KINDS, LAUNCHERS, JobSpec

if TYPE_CHECKING:
    from horovod_owt.slurm.status import JobStatus

# of sbatch, by the same names and with the same values
SBATCH_OPTIONS = {
    "--job-name": "Default: owt-KIND.",
    "--nodes": "A number, or MIN-MAX.",
    "--ntasks-per-node": "Ranks of a node. Default: one for each GPU.",
    "--gpus-per-node": "N, or TYPE:N.",
    "--gpus-per-task": "Each rank sees its own only; with --ntasks-per-node.",
    "--cpus-per-task": "Cores for a rank.",
    "--cpus-per-gpu": "Cores for a GPU's rank.",
    "--mem": "Of a node.",
    "--time": "Limit of one start, such as 24:00:00.",
    "--partition": "",
    "--account": "",
    "--qos": "",
    "--constraint": "Features that nodes must have.",
    "--array": "Such as 0-4%2; {task} in an option of owt becomes the task's number.",
    "--dependency": "Such as afterok:1234.",
    "--output": "The log's name; %j is the job.",
    "--signal": "Default for train and elastic: B:USR1@120, a warning 120 s before the time limit.",
}
JOB_ID = click.argument("job_id", metavar="JOB")


@click.group()
def job() -> None:
    """Render, submit, watch and cancel jobs of a Slurm cluster.

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
        click.option("--kind", type=click.Choice(list(KINDS)), default="train", show_default=True),
        *(click.option(name, help=text) for name, text in SBATCH_OPTIONS.items()),
        click.option("--exclusive", is_flag=True, help="Nodes of its own."),
        click.option(
            "--sbatch", "extra", multiple=True, metavar="--NAME=VALUE", help="Any other one of sbatch's."
        ),
        click.option("--module", "modules", multiple=True, metavar="NAME", help="`module load` it first."),
        click.option("--venv", help="Activate this virtual environment. Default: the environment of sbatch."),
        click.option("--container-image", help="Ranks run in it, by Pyxis."),
        click.option("--apptainer", metavar="IMAGE", help="Ranks run in it, by Apptainer."),
        click.option(
            "--launcher", type=click.Choice(LAUNCHERS), help="Of the ranks. Default: what the site has."
        ),
        click.option(
            "--min-ranks",
            type=click.IntRange(min=1),
            help="Of an elastic job: fewer end this start of it. Default: half of its ranks.",
        ),
        click.option(
            "--max-restarts",
            type=click.IntRange(min=0),
            help=f"Times that a stopped job goes back to the queue. Default: {JobSpec.max_restarts}.",
        ),
    ]
    return functools.reduce(lambda decorated, decorate: decorate(decorated), reversed(decorators), with_spec)


@job.command()
@job_options
def render(spec: JobSpec) -> None:
    """Print the job's sbatch script; without DATA, it takes DATA and options when it is submitted.

    \b
    Example:  owt job render --nodes 8 --gpus-per-node 4 > train.sbatch
              sbatch train.sbatch /data/imagenet --run-dir runs/first
    """
    from horovod_owt.slurm.script import render

    click.echo(render(spec), nl=False)


@job.command()
@job_options
@click.option("--dry-run", is_flag=True, help="Print the script, submit nothing.")
def submit(spec: JobSpec, dry_run: bool) -> None:
    """Submit a job and print its number.

    \b
    Examples:  owt job submit --nodes 8 --gpus-per-node 4 /data/imagenet -- --run-dir runs/first
               owt job submit --array 0-4 --gpus-per-node 4 /data/imagenet -- --set seed={task}
    """
    from horovod_owt.slurm.client import submit
    from horovod_owt.slurm.script import render

    if not spec.owt_args and spec.restarts:
        raise click.UsageError("no DATA to train on")
    script = render(spec)
    click.echo(script if dry_run else submit(script), nl=not dry_run)


@job.command()
@JOB_ID
@click.option("--run-dir", type=click.Path(path_type=Path), help="Where Slurm does not know it any more.")
@JSON_OPTION
def status(job_id: str, run_dir: Path | None, as_json: bool) -> None:
    """Say how the job JOB (1234, or 1234_2 of an array) is and how far its run has come.

    \b
    Example:  owt job status 1234 --json
    """
    from horovod_owt.slurm.status import job_status

    found = job_status(job_id, run_dir)
    click.echo(json.dumps(found.to_dict()) if as_json else _in_words(found))


@job.command()
@JOB_ID
def cancel(job_id: str) -> None:
    """End the job JOB; a run stops at a checkpoint if the site's KillWait leaves it the time.

    \b
    Example:  owt job cancel 1234
    """
    from horovod_owt.slurm.client import cancel

    cancel(job_id)


def _in_words(found: JobStatus) -> str:
    shown = {name: "-" if value is None else value for name, value in found.to_dict().items()}
    return "\n".join(f"{name.replace('_', ' '):12}  {value}" for name, value in shown.items())
