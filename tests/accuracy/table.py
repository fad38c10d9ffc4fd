"""What came out, as the tables of docs/accuracy.md."""

import json
from pathlib import Path
from statistics import mean

from accuracy.cells import DATA, SEEDS, WAYS, Cell

PAGE = Path(__file__).resolve().parents[2] / "docs" / "accuracy.md"
BEGIN, END = "<!-- accuracy: written by make accuracy -->", "<!-- /accuracy -->"
OFF = 2.2  # the loss below which a net of ten classes, which begins at 2.3, has left its plateau
WINDOW = 10  # steps that are averaged


def write(folder: Path) -> None:
    """Put the tables of what is done into the page, and print them."""
    lines = [*_accuracy(folder), "", *_plateau(folder)]
    print("\n".join(lines))
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text("\n".join([before + BEGIN, "", *lines, "", END]) + rest.partition(END)[2])


def _result(folder: Path, cell: Cell) -> dict | None:
    file = folder / "results" / f"{cell.name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def _accuracy(folder: Path) -> list[str]:
    lines = ["| way | " + " | ".join(DATA) + " |", "|---|" + "---|" * len(DATA)]
    for way in WAYS:
        found = []
        for data in DATA:
            results = [_result(folder, Cell(way, data, seed)) for seed in SEEDS]
            found.append(_spread([result["top1"] for result in results if result]))
        if any(found):
            lines.append(f"| {way} | " + " | ".join(found) + " |")
    return lines


def _spread(top1: list[float]) -> str:
    """Mean, least and most; with the number of seeds where some are missing."""
    if not top1:
        return ""
    few = "" if len(top1) == len(SEEDS) else f", {len(top1)} seed{'s' * (len(top1) > 1)}"
    return f"{mean(top1):.1f} ({min(top1):.1f} to {max(top1):.1f}{few})"


def _plateau(folder: Path) -> list[str]:
    ways = ("plain torch loop", "data, 1 rank", "data, 2 ranks")
    curves = {way: _result(folder, Cell(way, "digits", 0, plateau=True)) for way in ways}
    curves = {way: result["losses"] for way, result in curves.items() if result}
    if "plain torch loop" not in curves:
        return []
    plain = curves["plain torch loop"]
    lines = [
        f"| way | first step with a mean loss below {OFF:g} | largest difference of a loss up to there | "
        "final loss |",
        "|---|---|---|---|",
    ]
    for way, losses in curves.items():
        means = [mean(losses[max(0, step - WINDOW) : step]) for step in range(1, len(losses) + 1)]
        off = next((step for step, loss in enumerate(means, 1) if loss < OFF), len(losses))
        apart = max(abs(a - b) for a, b in zip(losses[:off], plain[:off], strict=True))
        lines.append(f"| {way} | {off} | {apart:.1e} | {means[-1]:.3f} |")
    return lines
