"""What came out, as the tables of docs/accuracy.md."""

import json
from pathlib import Path
from statistics import mean

from accuracy.cells import DATA, SEEDS, WAYS, Cell

PAGE = Path(__file__).resolve().parents[2] / "docs" / "accuracy.md"
BEGIN, END = "<!-- accuracy: written by make accuracy -->", "<!-- /accuracy -->"
OFF = (2.25, 2.0)  # losses below the plateau of a net of ten classes, which begins at 2.30
FIRST = 50  # steps in which the order of additions does not show yet
WINDOW = 10  # steps that are averaged


def write(folder: Path) -> None:
    """Put the tables of what is done into the page, and print them."""
    put_between(PAGE, BEGIN, END, [*_accuracy(folder), "", *_plateau(folder)])


def put_between(page: Path, begin: str, end: str, lines: list[str]) -> None:
    """Replace what is between two marks of a page, and print it."""
    print("\n".join(lines))
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    page.write_text(
        "\n".join([before + begin, "", *lines, "", end]) + rest.partition(end)[2], encoding="utf-8"
    )


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
    below = " | ".join(f"first step below {loss:g}" for loss in OFF)
    lines = [
        f"| way | largest difference in the first {FIRST} steps | {below} | final loss |",
        "|---|---|" + "---|" * len(OFF) + "---|",
    ]
    for way, losses in curves.items():
        means = [mean(losses[max(0, step - WINDOW) : step]) for step in range(1, len(losses) + 1)]
        first = [next((str(step) for step, m in enumerate(means, 1) if m < loss), "-") for loss in OFF]
        apart = max(abs(a - b) for a, b in zip(losses[:FIRST], plain[:FIRST], strict=True))
        lines.append(f"| {way} | {apart:.1e} | {' | '.join(first)} | {means[-1]:.2f} |")
    return lines
