"""The `owt` command: its subcommands, and error handling."""

from __future__ import annotations

import os
import sys
import time
import traceback

import click

from horovod_owt import __version__
from horovod_owt.commands.bench import bench
from horovod_owt.commands.checkpoint import checkpoint
from horovod_owt.commands.control import save, stop
from horovod_owt.commands.data import data
from horovod_owt.commands.devices import devices
from horovod_owt.commands.evaluate import evaluate
from horovod_owt.commands.export import export
from horovod_owt.commands.goodput import goodput_command
from horovod_owt.commands.info import info
from horovod_owt.commands.job import job
from horovod_owt.commands.launch import launch
from horovod_owt.commands.metrics import metrics
from horovod_owt.commands.plan import plan
from horovod_owt.commands.predict import predict
from horovod_owt.commands.preflight import preflight
from horovod_owt.commands.recipe import recipe
from horovod_owt.commands.report import plot, report
from horovod_owt.commands.streams import tolerate_closed_streams
from horovod_owt.commands.train import train
from horovod_owt.errors import PrintedBy, as_owt_error
from horovod_owt.logs import print_error
from horovod_owt.text import tolerant_streams, without_terminal_codes
from horovod_owt.topology import read_topology

# How long the other ranks of a host wait before they print an error that all ranks raised: by then the
# launcher has usually ended them, and the host reports the error once.
OTHER_RANKS_WAIT_S = 5.0


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> None:
        try:
            super().invoke(ctx)
        except (EOFError, BrokenPipeError) as error:  # not of stdout; click would exit silently
            raise RuntimeError(f"{type(error).__name__}: {error}") from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="owt")
def cli() -> None:
    """Train AlexNet-OWT on ImageNet-like data sets with Horovod, on one rank or many.

    \b
    Example:  owt data synth /tmp/synth
              owt launch local -- /tmp/synth --recipe quickstart --run-dir runs/first
    """


for command in (
    data,
    recipe,
    train,
    evaluate,
    predict,
    export,
    checkpoint,
    report,
    plot,
    goodput_command,
    metrics,
    stop,
    save,
    devices,
    info,
    preflight,
    plan,
    bench,
    launch,
    job,
):
    cli.add_command(command)


def main() -> None:
    """Run the command line. An OwtError is printed as one line and sets the exit code; others are bugs."""
    tolerate_closed_streams()
    tolerant_streams()
    # Huge pages for torch's large tensors, without which a step of 32 images on a CPU core takes 10 to 17 %
    # longer. Must be set before torch allocates.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    topology = read_topology()
    alone = topology.world_size == 1
    who = "" if alone else f"[rank {topology.rank} {topology.host}] "
    try:
        try:
            cli.main()
        finally:
            sys.stdout.flush()
    except Exception as raised:
        error = as_owt_error(raised)
        if error is None:
            print_error(f"{who}a bug, please report it\n{traceback.format_exc()}")
        else:
            if error.printed_by is PrintedBy.EVERY_RANK and topology.local_rank != 0:
                time.sleep(OTHER_RANKS_WAIT_S)
            if error.printed_by is not PrintedBy.RANK_0 or error.rank == 0:
                print_error(f"{who}{without_terminal_codes(str(error))}")
        exit_code = error.exit_code if error else 1
    if alone:
        sys.exit(exit_code)
    # Skip Horovod's exit handler, which would wait for peers that may be hung; the launcher ends them.
    sys.stdout.flush()
    os._exit(exit_code)
