"""Plot a confusion matrix. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from horovod_owt.files import output_file
from horovod_owt.perf.plot import check_plot, drawable

SUFFIXES = (".svg", ".png")
MAX_LABELS = 40  # with more classes, their names do not fit


def check_confusion(path: Path) -> None:
    """Raise ConfigError if matplotlib is missing or the file name is unsuitable."""
    check_plot(path, "--confusion", SUFFIXES)


def plot_confusion(matrix: np.ndarray, names: Sequence[str], path: Path, *, title: str) -> None:
    """Plot `matrix` (classes, classes): images by class (row) and predicted class (column)."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    share = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    with rc_context({"svg.hashsalt": "owt", "svg.fonttype": "none"}):  # the same bytes each time
        figure = Figure(figsize=(8, 7), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(share, vmin=0, vmax=100, cmap="viridis", interpolation="nearest")
        axes.set(title=title, xlabel="predicted class", ylabel="class")
        if len(names) <= MAX_LABELS:
            shown = [drawable(name) for name in names]
            axes.set_xticks(range(len(names)), shown, rotation=90, fontsize="small")
            axes.set_yticks(range(len(names)), shown, fontsize="small")
        figure.colorbar(image, label="% of the class")
        with output_file(path, "--confusion") as file:
            kind = path.suffix[1:]
            figure.savefig(file, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
