"""Plots of plans and benchmarks, as SVG. Needs matplotlib."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from pathlib import Path
from typing import Any

from horovod_owt.errors import ConfigError
from horovod_owt.files import output_file
from horovod_owt.perf.machine import Machine
from horovod_owt.perf.text import gradients_name, strategy_name
from horovod_owt.text import one_line, valid


def plot_scaling(document: dict[str, Any], machine: Machine, path: Path) -> None:
    """Plot images/s by ranks, a line for each strategy, and the ideal line."""
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in document["rows"]:
        lines[strategy_name(row) + gradients_name(row)].append((row["gpus"], row["images_per_s"]))
    row = document["rows"][0]
    alone = row["images_per_s"] / row["efficiency"] / row["gpus"]
    ranks = [row["gpus"] for row in document["rows"]]
    ideal = [(n, alone * n) for n in (1, max(ranks))]
    plot_lines(
        {"ideal": ideal, **lines},
        path,
        title=f"{machine.name}: predicted, {document['method']['batch_per_rank']} images per rank",
        x="ranks",
        y="images/s",
        dashed="ideal",
    )


def plot_collectives(report: dict[str, Any], path: Path) -> None:
    """Plot busbw by size, a line for each collective."""
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in report["rows"]:
        lines[row["collective"]].append((row["bytes"], row["busbw_gb_s"]))
    method = report["method"]
    title = f"{method['library']}, {method['ranks']} ranks"
    plot_lines(lines, path, title=title, x="bytes", y="busbw, GB/s")


def plot_lines(
    lines: dict[str, list[tuple[float, float]]], path: Path, *, title: str, x: str, y: str, dashed: str = ""
) -> None:
    """Lines through (x, y) points on logarithmic axes, written as an SVG; raises ConfigError."""
    check_lines_plot(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "owt", "svg.fonttype": "none"}):  # the same bytes each time
        figure = Figure(figsize=(7.2, 4.5), layout="constrained")
        axes = figure.subplots()
        for name, points in lines.items():
            xs, ys = zip(*sorted(points), strict=True)
            style = (
                {"linestyle": "--", "color": "grey"} if name == dashed else {"marker": "o", "markersize": 4}
            )
            axes.plot(xs, ys, label=name, **style)
        axes.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")
        axes.grid(True, which="major", alpha=0.3)
        axes.legend(fontsize="small")
        with output_file(path, "--plot") as file:
            figure.savefig(file, format="svg", metadata={"Date": None})


def check_lines_plot(path: Path) -> None:
    """Raise ConfigError if `plot_lines` would fail; for callers that measure first."""
    check_plot(path, "--plot", (".svg",))


def drawable(text: str) -> str:
    """A name escaped for matplotlib, which takes text between two `$` for a formula."""
    return valid(one_line(text)).replace("$", r"\$")


def check_plot(path: Path, option: str, suffixes: tuple[str, ...]) -> None:
    """Raise ConfigError if matplotlib is missing or the file name is unsuitable."""
    if importlib.util.find_spec("matplotlib") is None:
        fix = "pip install 'horovod_owt[plots]'"
        raise ConfigError(f"{option} without matplotlib", wanted="matplotlib", fix=fix)
    if path.suffix not in suffixes:
        raise ConfigError(f"{option} {path}", wanted=f"a name that ends in {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: no folder {path.parent}", wanted="an existing folder")
