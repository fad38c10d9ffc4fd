"""owt report and owt plot: HTML reports of runs, and figures for papers."""

from __future__ import annotations

import json
from pathlib import Path

import click

from horovod_owt.commands.options import JSON_OPTION, UsersPath
from horovod_owt.files import output_file

RUNS = click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=UsersPath())


@click.command()
@RUNS
@click.option(
    "--output",
    type=UsersPath(dir_okay=False),
    metavar="FILE",
    help="Where to write the page.  [default: RUN/report.html; for several runs, ./report.html]",
)
@click.option(
    "--evaluation",
    type=UsersPath(),
    metavar="FILE",
    help="Output of `owt evaluate --json` for the run.  [default: RUN/evaluation.json, if it exists]",
)
@click.option(
    "--points",
    type=click.IntRange(2, 20_000),
    default=1200,
    show_default=True,
    help="Maximum number of points per curve; with more steps, each point is the mean of several.",
)
@JSON_OPTION
def report(
    runs: tuple[Path, ...], output: Path | None, evaluation: Path | None, points: int, as_json: bool
) -> None:
    """Write an HTML report of one run, or of several side by side, from the run folders alone.

    \b
    Examples:  owt report runs/first
               owt report runs/first runs/second --output both.html
               owt report runs/first --json

    The page is self-contained: one file that needs no network. --json prints the figures and curves instead.
    Runs in progress and folders of older versions work too.
    """
    from horovod_owt.report.render import page
    from horovod_owt.report.summary import summarize_all
    from horovod_owt.runs.folder import report_file

    summaries = summarize_all(runs, max_points=points, evaluation=evaluation)
    if as_json:
        click.echo(json.dumps({"runs": summaries}, allow_nan=False))
        return
    path = output or report_file(runs[0] if len(runs) == 1 else Path())
    html = page(summaries, max_points=points, folder=path.parent)
    with output_file(path, "--output") as file:
        file.write(html.encode(errors="backslashreplace"))
    click.echo(path)


@click.command()
@RUNS
@click.option(
    "--out",
    type=UsersPath(dir_okay=False),
    required=True,
    metavar="FILE",
    help="Where to write the figure: a name that ends in .svg, .pdf or .png.",
)
@click.option(
    "--what",
    type=click.Choice(["loss", "accuracy", "lr", "throughput", "gradient"]),
    multiple=True,
    default=["loss", "accuracy"],
    show_default=True,
    help="What to plot, one panel each; may be repeated.",
)
@click.option(
    "--over", type=click.Choice(["step", "epoch", "time"]), default="epoch", show_default=True, help="X axis."
)
@click.option("--log", is_flag=True, help="Logarithmic axes for loss and gradient norm.")
def plot(runs: tuple[Path, ...], out: Path, what: tuple[str, ...], over: str, log: bool) -> None:
    """Plot curves of one or more runs as a figure for a paper. Needs matplotlib.

    \b
    Examples:  owt plot runs/first --out loss.svg
               owt plot runs/first runs/second --out speed.pdf --what throughput --over time

    With more than 2000 steps, a line shows means of several steps, and a band their minimum and maximum.
    """
    from horovod_owt.report.plot import plot_runs

    plot_runs(runs, out, what=what, x=over, log=log)
    click.echo(out)
