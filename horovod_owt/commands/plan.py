"""owt plan: predict a job before a node is rented."""

from __future__ import annotations

import json
import math
from pathlib import Path

import click

from horovod_owt.commands.options import (
    JSON_OPTION,
    RECIPE_OPTION,
    SET_OPTION,
    UsersPath,
    with_parallel,
)
from horovod_owt.errors import ConfigError


@click.command()
@click.option("--machine", default="boston-k80", show_default=True, metavar="NAME|FILE", help="Machine file.")
@click.option(
    "--nodes", "nodes_text", default="1", show_default=True, metavar="N,N,...", help="Numbers of nodes."
)
@click.option("--ranks-per-node", type=click.IntRange(1), help="Ranks per node.  [default: one per device]")
@click.option(
    "--network", metavar="NAME", help="Replace the machine's network between nodes, e.g. by ib-fdr."
)
@click.option(
    "--figure",
    "replaced",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a figure of the machine file, e.g. link_gb_s=2; may be repeated.",
)
@RECIPE_OPTION
@click.option(
    "--parallel",
    type=click.Choice(["data", "hybrid", "auto"]),
    default="auto",
    show_default=True,
    help="Only this strategy; auto: all of them.",
)
@SET_OPTION
@click.option(
    "--images",
    type=click.IntRange(1),
    default=1_281_167,
    show_default=True,
    help="Training images in an epoch.",
)
@click.option("--no-decode", is_flag=True, help="Ignore JPEG decoding.")
@click.option("--two-level", is_flag=True, help="Sum inside nodes first (HOROVOD_HIERARCHICAL_ALLREDUCE=1).")
@click.option("--inexact", is_flag=True, help="Include lossy compression: onebit and powersgd:4.")
@click.option("--failures", is_flag=True, help="Include the cost of failures and of a slow node.")
@click.option("--slow", default=1.25, show_default=True, help="The slow node's compute time, as a multiple.")
@click.option("--plot", type=UsersPath(dir_okay=False), help="Write images/s by ranks, as SVG.")
@click.option("--published", is_flag=True, help="Compare predictions with published figures of the machine.")
@click.option("--claim", metavar="TEXT", help='Check a claim such as "1000 epochs in 32 minutes".')
@click.option("--error", type=float, help="With --claim: the error in percent, or the loss, that it states.")
@click.option(
    "--calibrate",
    "measured",
    multiple=True,
    type=UsersPath(exists=True),
    metavar="RUN|JSON",
    help="Take figures from a measurement: a run folder, or the JSON of owt bench; may be repeated.",
)
@click.option(
    "--out",
    type=UsersPath(dir_okay=False),
    help="With --calibrate: write the resulting machine file.",
)
@click.option("--list", "list_machines", is_flag=True, help="List the machines and exit.")
@JSON_OPTION
def plan(
    machine: str,
    nodes_text: str,
    ranks_per_node: int | None,
    network: str | None,
    replaced: tuple[str, ...],
    recipe: str | None,
    parallel: str,
    settings: tuple[str, ...],
    images: int,
    no_decode: bool,
    two_level: bool,
    inexact: bool,
    failures: bool,
    slow: float,
    plot: Path | None,
    published: bool,
    claim: str | None,
    error: float | None,
    measured: tuple[Path, ...],
    out: Path | None,
    list_machines: bool,
    as_json: bool,
) -> None:
    """Predict a job on a machine: step time, images/s, epoch time, memory, and the bottleneck.

    Prints a row for each strategy at its best group size K, with 32- and 16-bit gradients. Needs neither
    torch nor a GPU. Each figure in the machine file names its source; estimates are marked.

    \b
    Example:  owt plan --machine gce-k80-8 --nodes 1,2,4,8 --set batch=64
              owt plan --machine boston-k80 --nodes 8 --network ib-fdr
              owt plan --machine boston-k80 --nodes 4 --network 1gbe --inexact
              owt plan --nodes 64 --failures
              owt plan --claim "1000 epochs in 32 minutes" --error 6.9
    """
    from horovod_owt.config import resolve
    from horovod_owt.perf.calibrate import calibrate, net_for
    from horovod_owt.perf.machine import load_machine, load_network, machine_names, replace_figures

    if list_machines:
        about = {name: load_machine(name).about for name in machine_names()}
        click.echo(json.dumps(about) if as_json else "\n".join(f"{n:12}  {a}" for n, a in about.items()))
        return
    place = load_machine(machine)
    cfg = resolve(recipe, with_parallel(parallel, settings))
    net = net_for(cfg)
    place = calibrate(place, list(measured), net)
    if network:
        place = place.with_figures(f"--network {network}", estimate=True, **load_network(network))
    place = replace_figures(place, replaced)
    if out:
        if not measured:
            raise ConfigError("--out without --calibrate", wanted="a measurement to make the machine file of")
        from horovod_owt.files import output_file
        from horovod_owt.text import encode

        with output_file(out, "--out") as file:
            file.write(encode(place.to_yaml()))
    if plot and (claim or published):
        raise ConfigError(f"--plot with --{'claim' if claim else 'published'}", wanted="a plan to draw")
    if claim:
        from horovod_owt.perf.claim import check_claim, format_claim, parse_claim

        checked = check_claim(parse_claim(claim, error=error, machine=place), place, net)
        click.echo(json.dumps(checked) if as_json else format_claim(checked))
        return
    if error is not None:
        raise ConfigError("--error without --claim", wanted="the claim that states it")
    if published:
        from horovod_owt.perf.published import compare_published
        from horovod_owt.perf.text import format_published

        document = compare_published(place)
        click.echo(json.dumps(document) if as_json else format_published(document))
        return

    from horovod_owt.perf.request import PlanRequest, answer, parse_nodes
    from horovod_owt.perf.text import format_plan

    if not 1 <= slow < math.inf:
        raise ConfigError(f"--slow {slow:g}", wanted="at least 1, how many times as long the node computes")
    if (ranks_per_node or 0) > place.ranks_per_node:
        raise ConfigError(
            f"--ranks-per-node {ranks_per_node}",
            wanted=f"at most {place.ranks_per_node}, the devices of {place.name}",
            fix=f"--figure ranks_per_node={ranks_per_node}, of a larger machine",
        )
    request = PlanRequest(
        place,
        cfg,
        net,
        parse_nodes(nodes_text),
        ranks_per_node or place.ranks_per_node,
        images,
        decodes=not no_decode,
        two_level=two_level,
        inexact=inexact,
        slow=slow,
    )
    document = answer(request)
    if plot:
        from horovod_owt.perf.plot import plot_scaling

        plot_scaling(document, place, plot)
    if not as_json and not failures:
        document["goodput"] = []
    click.echo(json.dumps(document) if as_json else format_plan(document, place))
