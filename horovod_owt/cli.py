"""The `owt` command: its groups, and how it ends."""

from __future__ import annotations

import os
import sys
import time
import traceback

import click

from horovod_owt import __version__
from horovod_owt.commands.bench import bench
from horovod_owt.commands.checkpoint import checkpoint
from horovod_owt.commands.data import data
from horovod_owt.commands.devices import devices
from horovod_owt.commands.job import job
from horovod_owt.commands.launch import launch
from horovod_owt.commands.preflight import preflight
from horovod_owt.commands.train import train
from horovod_owt.errors import OwtError
from horovod_owt.topology import read_topology

# Of the ranks of a host that met the same trouble, the first one speaks; then the launcher ends the others,
# or they speak after all.
SPEAKER_GRACE_S = 5.0


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="owt")
def cli() -> None:
    """Train AlexNet-OWT on ImageNet-like folders of JPEGs, on one rank or on many.

    \b
    Example:  owt data synth /tmp/synth
              owt launch local -- /tmp/synth --recipe quickstart --run-dir runs/first
    """


for command in (data, train, checkpoint, devices, preflight, bench, launch, job):
    cli.add_command(command)


def main() -> None:
    """Run the command line: an OwtError becomes one line and its exit code, a bug ends the whole job."""
    # torch's large tensors in huge pages, or each new one costs a page fault for every 4 KB: a step of 32
    # images on a CPU core takes 10 to 17 % longer. Before torch allocates; what the user set stays.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    topology = read_topology()
    alone = topology.world_size == 1
    who = "" if alone else f"[rank {topology.rank} {topology.host}] "
    try:
        cli.main()
    except OwtError as error:
        if error.shared and topology.local_rank != 0:
            time.sleep(SPEAKER_GRACE_S)
        if not error.silent:
            print(f"owt: {who}{error}", file=sys.stderr, flush=True)
        exit_code = error.exit_code
    except Exception:
        print(f"owt: {who}a bug, please report it\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        exit_code = 1
    if alone:
        sys.exit(exit_code)
    # Who leaves in mid-job must not wait for its peers in Horovod's exit handler: the launcher ends them.
    sys.stdout.flush()
    os._exit(exit_code)
