"""owt preflight: check a job before it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from horovod_owt.commands.options import JSON_OPTION, UsersPath

if TYPE_CHECKING:
    from horovod_owt.preflight.findings import Finding


@click.command()
@click.argument("data", type=UsersPath(), required=False)
@click.option(
    "--run-dir",
    type=UsersPath(),
    default=Path("runs"),
    show_default=True,
    help="Check that this folder, in which runs will be stored, is writable, shared and has enough space.",
)
@JSON_OPTION
def preflight(data: Path | None, run_dir: Path, as_json: bool) -> None:
    """Check ranks, devices, hosts, the network and DATA, and print all findings. Exit code 3 if one is BAD.

    \b
    Examples:  owt preflight /tmp/synth
               horovodrun -np 8 -H node1:4,node2:4 owt preflight /data/imagenet --run-dir /shared/runs
               mpirun -np 4 owt preflight --json
               owt job submit --kind preflight --nodes 8 --gpus-per-node 4 /data/imagenet

    Start it with the launcher that you use for training. Each check has a time limit, and a rank that does
    not answer is reported.
    """
    from horovod_owt.commands.loading import loading
    from horovod_owt.commands.log import log_to_stderr
    from horovod_owt.data.machine import raise_open_file_limit
    from horovod_owt.errors import ProblemFound
    from horovod_owt.preflight.run import preflight
    from horovod_owt.topology import rank_topology

    log_to_stderr()
    raise_open_file_limit()  # as `owt train` does: rank 0 has a connection to every other rank
    topology = rank_topology()

    def tell(findings: list[Finding]) -> None:
        document = {"findings": [finding.to_dict() for finding in findings]}
        click.echo(json.dumps(document) if as_json else _table(findings))

    with loading():  # imports take most of the time of this short process
        bad = preflight(topology, data, run_dir, tell)
    if bad:
        found = f"{bad} bad finding{'s'[: bad > 1]}"
        raise ProblemFound(f"preflight failed: {found}; see BAD lines above").by_rank_0(topology.rank)


def _table(findings: list[Finding]) -> str:
    """The findings as text, bad ones last, at the end of a terminal's output."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in sorted(findings, key=lambda finding: not finding.ok):
        lines.append(f"{'ok  ' if finding.ok else 'BAD '}  {finding.check:{width}}  {finding.saw}")
        if not finding.ok:
            for name in ("wanted", "fix"):
                if text := getattr(finding, name):
                    lines.append(f"      {'':{width}}  {name}: {text}")
    return "\n".join(lines)
