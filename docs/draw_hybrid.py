"""Draw docs/hybrid.svg: python docs/draw_hybrid.py. A test keeps the file equal to what this draws."""

from __future__ import annotations

from pathlib import Path

from drawing import FAINT, INK, PANEL, PAPER, arrow, box, svg, text

FILE = Path(__file__).with_name("hybrid.svg")

CONV, BAR = "#d5dbe0", "#ffffff"  # what all ranks have; what moves between them
PARTS = (("#8fc1e3", "#2f78a8"), ("#f3bd86", "#b9691c"))  # fill and edge of the two parts of each FC layer

COLUMN, BETWEEN, PADDING, GAP = 160, 20, 20, 190  # px
GROUP = 2 * COLUMN + BETWEEN + 2 * PADDING
WIDTH, HEIGHT = 2 * GROUP + GAP + 40, 706
TOP = 20

# Upper edges, px
IMAGES, CONVOLUTIONS, GATHER, FC6, FC7, UNITS, FC8, LOGITS, LOSS = 80, 128, 236, 302, 372, 456, 522, 606, 660


def both_ways(x: float, y: float, to_y: float) -> list[str]:
    return [arrow(x - 7, y, to_y), arrow(x + 7, to_y, y)]


def layer(corners: list[tuple[float, float]], part: int, name: str) -> list[str]:
    """A layer's part: from the units that it reads, above, to those that it gives."""
    fill, edge = PARTS[part]
    points = " ".join(f"{x:g},{y:g}" for x, y in corners)
    x = sum(x for x, _ in corners) / 4
    y = (corners[0][1] + corners[2][1]) / 2
    return [
        f'<polygon points="{points}" fill="{fill}" stroke="{edge}"/>',
        text(x, y + 5, name, weight="bold"),
    ]


def rank(number: int, left: float) -> list[str]:
    """One rank's column."""
    part, middle, right = number % 2, left + COLUMN / 2, left + COLUMN
    own = (left, middle) if part == 0 else (middle, right)  # the half of the hidden units that it has
    center = sum(own) / 2
    return [
        text(middle, 70, f"rank {number}", weight="bold"),
        box(left, IMAGES, COLUMN, 28, PAPER),
        text(middle, IMAGES + 19, "its own b images"),
        arrow(middle, IMAGES + 28, CONVOLUTIONS),
        box(left, CONVOLUTIONS, COLUMN, 66, CONV),
        text(middle, CONVOLUTIONS + 30, "convolutions", weight="bold"),
        text(middle, CONVOLUTIONS + 48, "all 2.5 M weights", size=12, fill=FAINT),
        *both_ways(middle, CONVOLUTIONS + 66, GATHER),
        *both_ways(middle, GATHER + 40, FC6),
        *layer([(left, FC6), (right, FC6), (own[1], FC6 + 60), (own[0], FC6 + 60)], part, "fc6"),
        *layer([(own[0], FC7), (own[1], FC7), (right, FC7 + 60), (left, FC7 + 60)], part, "fc7"),
        *both_ways(middle, FC7 + 60, UNITS),
        *both_ways(center, UNITS + 40, FC8),
        *layer([(own[0], FC8), (own[1], FC8), (right, FC8 + 60), (left, FC8 + 60)], part, "fc8"),
        arrow(middle, FC8 + 60, LOGITS),
        arrow(middle, LOGITS + 30, LOSS),
        text(middle, LOSS + 16, "loss of all 2b images"),
    ]


def transfer(left: float, y: float, height: float, *lines: str) -> list[str]:
    """A bar across a group's columns: all its ranks meet here."""
    width = 2 * COLUMN + BETWEEN
    first = y + height / 2 + 5 - 8 * (len(lines) - 1)
    words = [text(left + width / 2, first + 16 * n, line, size=12) for n, line in enumerate(lines)]
    return [box(left, y, width, height, BAR, INK), *words]


def group(name: str, first_rank: int, left: float) -> list[str]:
    column = left + PADDING
    return [
        box(left, TOP, GROUP, HEIGHT - 2 * TOP, PANEL),
        text(left + GROUP / 2, TOP + 26, f"fc_group {name}", size=15, weight="bold"),
        *rank(first_rank, column),
        *rank(first_rank + 1, column + COLUMN + BETWEEN),
        *transfer(column, GATHER, 40, "forward: gather the features, 2b x 9216", "back: sum their gradients"),
        *transfer(
            column, UNITS, 40, "forward: sum fc7's units, each its half", "back: gather their gradients"
        ),
        *transfer(column, LOGITS, 30, "sum the logits, for both"),
    ]


def sum_between(y: float, colour: str, *lines: str) -> list[str]:
    """A sum of gradients between the groups."""
    left, right = TOP + GROUP, TOP + GROUP + GAP
    middle = (left + right) / 2
    words = [text(middle, y - 10 - 16 * n, line, size=12) for n, line in enumerate(reversed(lines))]
    return [
        *words,
        f'<path d="M{left + 12:g} {y:g}H{right - 12:g}" stroke="{colour}" stroke-width="2.5" '
        'stroke-dasharray="6 4"/>',
        f'<path d="M{left + 5:g} {y:g}l8 -5v10z" fill="{colour}"/>',
        f'<path d="M{right - 5:g} {y:g}l-8 -5v10z" fill="{colour}"/>',
    ]


def drawing() -> str:
    return svg(
        WIDTH,
        HEIGHT,
        "Four ranks in two groups: each has all convolutions and half of each FC layer",
        *group("0", 0, TOP),
        *group("1", 2, TOP + GROUP + GAP),
        *sum_between(CONVOLUTIONS + 40, FAINT, "gradients summed", "over all ranks"),
        *sum_between(FC7 - 18, PARTS[0][1], "gradients of equal parts", "summed over the groups"),
        *sum_between(FC7 + 2, PARTS[1][1]),
    )


if __name__ == "__main__":
    FILE.write_text(drawing())
