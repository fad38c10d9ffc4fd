"""owt launch: start a job without a scheduler, on this host or on several."""

from __future__ import annotations

import sys
from pathlib import Path

import click

RANKS = click.option(
    "--ranks",
    type=click.IntRange(min=1),
    metavar="N",
    help="Ranks on this host. Default: one for each GPU; on CPU cores, 2.",
)
HOSTS_HELP = "A file with lines HOST:SLOTS or HOST slots=SLOTS: a rank for each slot, started by ssh."
HOSTS = click.option("--hosts", type=click.Path(path_type=Path), metavar="FILE", help=HOSTS_HELP)
INTERFACE = click.option(
    "--interface", metavar="NAME", help="Of the network. Default: the one that leads to the other hosts."
)
PREFLIGHT = click.option(
    "--preflight", is_flag=True, help="Do not train: check these ranks, hosts, DATA and run folder."
)
DRY_RUN = click.option("--dry-run", is_flag=True, help="Print the command, start nothing.")
TRAIN = click.argument("train", nargs=-1, required=True, metavar="-- DATA --run-dir DIR [...]")


def max_restarts(default: int):
    return click.option(
        "--max-restarts",
        type=click.IntRange(min=0),
        default=default,
        show_default=True,
        metavar="N",
        help="Starts after a failure, from the last checkpoint.",
    )


@click.group()
def launch() -> None:
    """Start a job without a scheduler: on this host, on several, with or without MPI.

    The first signal (Ctrl-C, TERM, USR1, USR2) ends the job at a checkpoint with exit code 75, a second one
    at once; no process of it is left on this host. The exit code is that of outcome.json.

    \b
    Example:  owt launch local -- /data/imagenet --run-dir runs/first
              owt launch hosts --hosts HOSTS_FILE -- /data/imagenet --run-dir /shared/runs/first
    """


@launch.command()
@RANKS
@max_restarts(0)
@PREFLIGHT
@DRY_RUN
@TRAIN
def local(ranks: int | None, max_restarts: int, preflight: bool, dry_run: bool, train: tuple[str, ...]):
    """Train on this host, by horovodrun over Gloo.

    \b
    Example:  owt launch local -- /data/imagenet --run-dir runs/first
              owt launch local --ranks 4 --max-restarts 3 -- /data/imagenet --run-dir runs/first
    """
    from horovod_owt.topology import Launcher

    _run(Launcher.GLOO, train, ranks, None, None, max_restarts, preflight, dry_run)


@launch.command()
@click.option("--hosts", type=click.Path(path_type=Path), metavar="FILE", required=True, help=HOSTS_HELP)
@INTERFACE
@max_restarts(0)
@PREFLIGHT
@DRY_RUN
@TRAIN
def hosts(
    hosts: Path,
    interface: str | None,
    max_restarts: int,
    preflight: bool,
    dry_run: bool,
    train: tuple[str, ...],
):
    """Train on the hosts that a file names, by horovodrun over Gloo and ssh.

    \b
    Example:  owt launch hosts --hosts HOSTS_FILE --preflight -- /data/imagenet --run-dir /shared/runs/first
              owt launch hosts --hosts HOSTS_FILE -- /data/imagenet --run-dir /shared/runs/first
    """
    from horovod_owt.topology import Launcher

    _run(Launcher.GLOO, train, None, hosts, interface, max_restarts, preflight, dry_run)


@launch.command()
@RANKS
@HOSTS
@INTERFACE
@max_restarts(0)
@PREFLIGHT
@DRY_RUN
@TRAIN
def mpirun(
    ranks: int | None,
    hosts: Path | None,
    interface: str | None,
    max_restarts: int,
    preflight: bool,
    dry_run: bool,
    train: tuple[str, ...],
):
    """Train by Open MPI's mpirun, on this host or on those that a file names.

    \b
    Example:  owt launch mpirun --ranks 4 -- /data/imagenet --run-dir runs/first
              owt launch mpirun --hosts HOSTS_FILE -- /data/imagenet --run-dir /shared/runs/first
    """
    from horovod_owt.topology import Launcher

    _run(Launcher.MPIRUN, train, ranks, hosts, interface, max_restarts, preflight, dry_run)


def _run(launcher, train, ranks, hosts_file, interface, max_restarts, preflight, dry_run) -> None:
    from horovod_owt.launch.command import default_ranks, run
    from horovod_owt.launch.hosts import read_hosts

    _one_place(ranks, hosts_file)
    hosts = read_hosts(hosts_file) if hosts_file else {"localhost": ranks or default_ranks()}
    options = {"max_restarts": max_restarts, "preflight": preflight, "dry_run": dry_run}
    sys.exit(run(launcher, train, hosts, interface, **options))


def _one_place(ranks: int | None, hosts_file: Path | None) -> None:
    if ranks and hosts_file:
        raise click.UsageError("--ranks is for this host, --hosts names others: one of them")


@launch.command()
@RANKS
@HOSTS
@click.option(
    "--min-ranks",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Fewer end this start of the job.",
)
@click.option(
    "--max-ranks", type=click.IntRange(min=1), metavar="N", help="More are not used. Default: no limit."
)
@INTERFACE
@click.option(
    "--cooldown",
    type=click.IntRange(min=1),
    nargs=2,
    default=(10, 600),
    show_default=True,
    metavar="FIRST MOST",
    help="Seconds until a place that lost a rank gets another: twice FIRST, doubling up to MOST.",
)
@max_restarts(3)
@DRY_RUN
@TRAIN
def elastic(
    ranks: int | None,
    hosts: Path | None,
    min_ranks: int,
    max_ranks: int | None,
    interface: str | None,
    cooldown: tuple[int, int],
    max_restarts: int,
    dry_run: bool,
    train: tuple[str, ...],
):  # fmt: skip
    """Train with ranks that may come and go: whoever is left continues from the last commit.

    On this host each rank may die alone; it is started again after a while. On several, a dead rank takes
    its host along, and hosts join and leave as lines of the file do, which is read every second. The job
    restarts from the last checkpoint when too few ranks are left or one hangs. For data-parallel runs only:
    for hybrid ones there is --max-restarts of the other commands.

    \b
    Example:  owt launch elastic --ranks 4 -- /data/imagenet --run-dir runs/first
              owt launch elastic --hosts HOSTS_FILE --min-ranks 8 -- /data/imagenet --run-dir runs/first
    """
    from horovod_owt.launch.command import default_ranks
    from horovod_owt.launch.elastic import ElasticJob, run

    _one_place(ranks, hosts)
    job = ElasticJob.on(
        train,
        interface=interface,
        places=None if hosts else ranks or default_ranks(),
        hosts_file=hosts,
        min_ranks=min_ranks,
        max_ranks=max_ranks,
        cooldown_s=cooldown,
    )
    sys.exit(run(job, max_restarts=max_restarts, dry_run=dry_run))


@launch.command()
@max_restarts(3)
@DRY_RUN
@click.argument("command", nargs=-1, required=True, metavar="-- COMMAND")
def supervise(max_restarts: int, dry_run: bool, command: tuple[str, ...]):
    """Start a job by any COMMAND, and start it again from its last checkpoint when a failure ends it.

    Not after success, a signal, a bad configuration, or a run that comes no further.

    \b
    Example:  owt launch supervise -- horovodrun --gloo -np 4 owt train DATA --run-dir runs/first
              owt launch supervise --max-restarts 10 -- mpirun -np 64 owt train DATA --run-dir runs/first
              owt launch supervise -- torchrun --nproc-per-node 4 --no-python owt train DATA --run-dir r
    """
    from horovod_owt.launch.command import show
    from horovod_owt.launch.supervisor import Supervisor

    job = Supervisor(command, max_restarts=max_restarts)
    sys.exit(show(command, {}) if dry_run else job.run())


@launch.command(
    hidden=True,
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def gloo(words: tuple[str, ...]) -> None:
    """horovodrun with these words, whose ssh ends when its host is gone."""
    from horovod_owt.launch.horovodrun import run

    run(words)
