"""owt launch: start a job without a scheduler, on this host or several."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from horovod_owt.commands.options import UsersPath

RANKS = click.option(
    "--ranks",
    type=click.IntRange(min=1),
    metavar="N",
    help="Ranks on this host.  [default: one per GPU; without GPUs, 2]",
)
HOSTS_HELP = "File with lines HOST:SLOTS or HOST slots=SLOTS; one rank per slot, started by ssh."
HOSTS = click.option("--hosts", type=UsersPath(), metavar="FILE", help=HOSTS_HELP)
INTERFACE = click.option(
    "--interface", metavar="NAME", help="Network interface.  [default: the one that reaches the other hosts]"
)
PREFLIGHT = click.option(
    "--preflight", is_flag=True, help="Check ranks, hosts, DATA and run folder instead of training."
)
DRY_RUN = click.option("--dry-run", is_flag=True, help="Print the command instead of starting it.")
TRAIN = click.argument("train", nargs=-1, required=True, metavar="-- DATA --run-dir DIR [...]")


def max_restarts(default: int):
    return click.option(
        "--max-restarts",
        type=click.IntRange(min=0),
        default=default,
        show_default=True,
        metavar="N",
        help="Restart automatically after a failure, from the last checkpoint, at most this often.",
    )


@click.group()
def launch() -> None:
    """Start a job without a scheduler, on this host or several, with or without MPI.

    The first signal (Ctrl-C, TERM, HUP, USR1, USR2) stops the job at a checkpoint with exit code 75, a second
    one kills it; no process is left on this host. The exit code is the one in outcome.json.

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
    """Train on this host with horovodrun and Gloo.

    \b
    Example:  owt launch local -- /data/imagenet --run-dir runs/first
              owt launch local --ranks 4 --max-restarts 3 -- /data/imagenet --run-dir runs/first
    """
    from horovod_owt.topology import Launcher

    _run(Launcher.GLOO, train, ranks, None, None, max_restarts, preflight, dry_run)


@launch.command()
@click.option("--hosts", type=UsersPath(), metavar="FILE", required=True, help=HOSTS_HELP)
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
    """Train on the hosts in a file with horovodrun, Gloo and ssh.

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
    """Train with Open MPI's mpirun, on this host or on the hosts in a file.

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
        raise click.UsageError("--ranks is for this host, --hosts for others: pass one of them")


@launch.command()
@RANKS
@HOSTS
@click.option(
    "--min-ranks",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="If fewer ranks are left, the job restarts from the last checkpoint.",
)
@click.option(
    "--max-ranks", type=click.IntRange(min=1), metavar="N", help="Use at most N ranks.  [default: no limit]"
)
@INTERFACE
@click.option(
    "--cooldown",
    type=click.IntRange(min=1),
    nargs=2,
    default=(10, 600),
    show_default=True,
    metavar="FIRST MAX",
    help="Seconds until a host that lost a rank is used again: twice FIRST, doubling up to MAX.",
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
    """Elastic training: when ranks are lost, the others continue from the last commit.

    On one host a dead rank is restarted after a while. On several, the whole host of a dead rank is dropped,
    and hosts can be added to and removed from the file, which is read every second. The job restarts from the
    last checkpoint if too few ranks are left or one hangs. Only for data-parallel runs; for hybrid runs use
    --max-restarts of the other commands.

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
        slots=None if hosts else ranks or default_ranks(),
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
    """Run any training COMMAND, and restart it from its last checkpoint after a failure.

    It is not restarted after success, a signal, a configuration error, or a failure without progress.

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
    """horovodrun with ssh timeouts for lost hosts."""
    from horovod_owt.launch.horovodrun import run

    run(words)
