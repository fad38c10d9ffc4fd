"""Figures of runs for papers, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from horovod_owt.files import output_file
from horovod_owt.perf.plot import check_plot, drawable
from horovod_owt.report.formats import is_number
from horovod_owt.report.series import clock_of, curves
from horovod_owt.report.summary import history_of, names_of, validations_of

SUFFIXES = (".svg", ".pdf", ".png")
CURVES = {  # the records' column, the axis label, whether --log applies
    "loss": ("loss", "training loss", True),
    "accuracy": ("", "validation accuracy, %", False),
    "lr": ("lr", "learning rate", False),
    "throughput": ("images_per_s", "images/s", False),
    "gradient": ("grad_norm", "gradient norm", True),
}
AXES = {"step": "step", "epoch": "epoch", "time": "hours"}
MAX_POINTS = 2000
PANEL = (3.4, 2.6)  # inches; one is as wide as a column of a paper
COLOURS = ("#1f5fbf", "#c05a12", "#1c7a55", "#7a45c2", "#b3263a", "#0c7487", "#7d6608", "#5b616b")
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "owt",  # the same bytes each time
    "pdf.fonttype": 42,
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
}


def plot_runs(
    runs: Sequence[Path], path: Path, *, what: Sequence[str], x: str = "step", log: bool = False
) -> None:
    """A panel for each of `what`, by name in CURVES, with a line for each run; raises ConfigError."""
    check_plot(path, "--out", SUFFIXES)
    found = [_curves(run) | {"name": _label(name)} for run, name in zip(runs, names_of(runs), strict=True)]
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(PANEL[0] * len(what), PANEL[1]), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(what), squeeze=False)[0], what, strict=True):
            column, title, may_be_log = CURVES[name]
            for run, colour in zip(found, COLOURS * len(found), strict=False):
                if name == "accuracy":
                    _draw_accuracy(axes, run, x, colour)
                else:
                    _draw(axes, run, column, x, colour)
            axes.set(xlabel=AXES[x], ylabel=title)
            axes.set_yscale("log") if log and may_be_log else axes.set_ylim(bottom=0)
            if axes.lines and (len(found) > 1 or name == "accuracy"):
                axes.legend()
        with output_file(path, "--out") as file:
            metadata = {"Date": None} if path.suffix == ".svg" else {}
            figure.savefig(file, format=path.suffix[1:], dpi=200, metadata=metadata)


def _curves(run_dir: Path) -> dict[str, Any]:
    history = history_of(run_dir)
    scores = validations_of(history, clock_of(history))
    segments = curves(history, MAX_POINTS)["segments"]
    kept = [segment for segment in segments if segment["kept"]]
    return {"segments": kept, "validations": scores}


def _label(name: str) -> str:
    """The name for a legend: matplotlib leaves out labels that begin with `_`."""
    name = drawable(name)
    return f"\N{ZERO WIDTH SPACE}{name}" if name.startswith("_") else name


def _draw(axes: Any, run: dict[str, Any], column: str, x: str, colour: str) -> None:
    """A line through the buckets' means, and their ranges as a band."""
    rows = [
        (_place(at, x), y, low, high)
        for segment in run["segments"]
        if column in segment
        for at, y, low, high in zip(
            segment[x],
            segment[column],
            segment.get(f"{column}_low", segment[column]),
            segment.get(f"{column}_high", segment[column]),
            strict=True,
        )
        if at is not None and y is not None
    ]
    if not rows:
        return
    places, means, lows, highs = zip(*rows, strict=True)
    if lows != highs:
        axes.fill_between(places, lows, highs, color=colour, alpha=0.18, linewidth=0)
    axes.plot(places, means, color=colour, label=run["name"])


def _draw_accuracy(axes: Any, run: dict[str, Any], x: str, colour: str) -> None:
    for score, style in (("top1", "-"), ("top5", "--")):
        rows = [(_place(row[x], x), row[score]) for row in run["validations"] if is_number(row[score])]
        rows = [row for row in rows if row[0] is not None]
        if rows:
            label = f"{run['name']}, top-{score[3:]}"
            axes.plot(*zip(*rows, strict=True), style, color=colour, marker="o", markersize=2.5, label=label)


def _place(value: Any, x: str) -> float | None:
    if not is_number(value):
        return None
    return value / 3600 if x == "time" else value
