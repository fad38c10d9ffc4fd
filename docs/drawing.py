"""What the pictures of the documents are drawn with: a few SVG shapes in one set of colours."""

from __future__ import annotations

PAPER, PANEL, EDGE, INK, FAINT = "#fcfcfa", "#eef0f2", "#9aa3ab", "#22282d", "#5b666f"


def text(x: float, y: float, words: str, *, size: int = 13, fill: str = INK, weight: str = "normal") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" font-weight="{weight}" '
        f'text-anchor="middle">{words}</text>'
    )


def box(x: float, y: float, width: float, height: float, fill: str, edge: str = EDGE) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" fill="{fill}" '
        f'stroke="{edge}"/>'
    )


def arrow(x: float, y: float, to_y: float, colour: str = FAINT) -> str:
    """Downwards is forward, upwards backward."""
    tip = 5 if to_y > y else -5
    return (
        f'<path d="M{x:g} {y:g}V{to_y - tip:g}" stroke="{colour}" stroke-width="1.5"/>'
        f'<path d="M{x - 4:g} {to_y - tip:g}h8l-4 {tip:g}z" fill="{colour}"/>'
    )


def svg(width: float, height: float, title: str, *parts: str) -> str:
    """A whole file: `parts` on paper of that many pixels; `title` is what a screen reader says."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" fill="none" '
        'font-family="Helvetica, Arial, sans-serif" role="img">'
    )
    lines = [head, f"<title>{title}</title>", box(0.5, 0.5, width - 1, height - 1, PAPER), *parts, "</svg>"]
    return "\n".join(lines) + "\n"
