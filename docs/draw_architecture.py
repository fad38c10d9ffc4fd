"""Draw docs/architecture.svg: python docs/draw_architecture.py. A test keeps the file up to date."""

from __future__ import annotations

from pathlib import Path

from drawing import FAINT, PANEL, arrow, box, svg, text

FILE = Path(__file__).with_name("architecture.svg")

START, STAGE, FILES = "#f7e3cd", "#d7e7f3", "#e3ecd9"  # what starts ranks; what a rank runs; what is on disk
WIRE, PULSE = "#2f78a8", "#b9691c"  # Horovod's collectives; the heartbeat

RANK, BETWEEN, LEFT = 288, 180, 37  # px
WIDTH, HEIGHT = 2 * (LEFT + RANK) + BETWEEN, 718
LAUNCH, HOSTS, DISK = 20, 172, 610  # upper edges, px

STAGES = (
    ("data set", "JPEG folder or tar shards", FILES),
    ("order", "seed and position -> sample indices", STAGE),
    ("pipeline", "DALI or torchvision: decode, crop, flip", STAGE),
    ("replica", "AlexNet-OWT, optimizer", STAGE),
    ("strategy", "data-parallel or hybrid", STAGE),
)
STAGE_HEIGHT, STAGE_STEP = 48, 74


def labelled(x: float, y: float, width: float, height: float, fill: str, name: str, more: str) -> list[str]:
    middle = x + width / 2
    return [
        box(x, y, width, height, fill),
        text(middle, y + height / 2 - 3, name, weight="bold"),
        text(middle, y + height / 2 + 14, more, size=12, fill=FAINT),
    ]


def rank(name: str, left: float) -> list[str]:
    """One rank: the path of an image from the top to the strategy."""
    parts = [
        box(left, HOSTS, RANK, STAGE_STEP * len(STAGES) + 36, PANEL),
        text(left + RANK / 2, HOSTS + 23, name, size=14, weight="bold"),
    ]
    for number, (stage, more, fill) in enumerate(STAGES):
        y = stage_top(number)
        parts += labelled(left + 16, y, RANK - 32, STAGE_HEIGHT, fill, stage, more)
        if number:
            parts.append(arrow(left + RANK / 2, y - STAGE_STEP + STAGE_HEIGHT, y))
    return parts


def stage_top(number: int) -> float:
    return HOSTS + 36 + STAGE_STEP * number


def between(y: float, colour: str, above: str, *below: str, dashes: str = "none") -> list[str]:
    """A two-way arrow from rank to rank."""
    left, right = LEFT + RANK, LEFT + RANK + BETWEEN
    middle = (left + right) / 2
    return [
        text(middle, y - 10, above, size=12, weight="bold", fill=colour),
        *(text(middle, y + 18 + 15 * n, line, size=12) for n, line in enumerate(below)),
        f'<path d="M{left + 12:g} {y:g}H{right - 12:g}" stroke="{colour}" stroke-width="2.5" '
        f'stroke-dasharray="{dashes}"/>',
        f'<path d="M{left + 5:g} {y:g}l8 -5v10z" fill="{colour}"/>',
        f'<path d="M{right - 5:g} {y:g}l-8 -5v10z" fill="{colour}"/>',
    ]


def start(left: float, width: float) -> list[str]:
    """Whatever starts ranks."""
    half = (width - 48) / 2
    return [
        box(left, LAUNCH, width, 116, PANEL),
        *labelled(left + 16, LAUNCH + 16, half, 56, START, "owt launch", "one box, hosts over ssh, elastic"),
        *labelled(
            left + half + 32, LAUNCH + 16, half, 56, START, "owt job", "Slurm: submit, status, requeue"
        ),
        text(left + width / 2, LAUNCH + 97, "horovodrun, mpirun, srun or torchrun start the ranks"),
    ]


def run_folder(left: float, width: float) -> list[str]:
    middle = left + width / 2
    files = "checkpoints/step-N: model, optimizer, state, sha256 manifest"
    return [
        box(left, DISK, width, 84, FILES),
        text(middle, DISK + 26, "run folder", size=14, weight="bold"),
        text(middle, DISK + 48, "config.json, metrics.jsonl, outcome.json", size=12),
        text(middle, DISK + 67, files, size=12),
    ]


def restart(right: float) -> list[str]:
    """From the run folder back to what starts ranks, on the right-hand side."""
    x, launch = WIDTH - LEFT / 2, LAUNCH + 58
    words_x, words_y = x - 6, (launch + DISK) / 2 + 30
    return [
        f'<path d="M{right:g} {DISK + 42:g}H{x:g}V{launch:g}H{right + 6:g}" stroke="{FAINT}" '
        'stroke-width="1.5"/>',
        f'<path d="M{right + 2:g} {launch:g}l7 -4v8z" fill="{FAINT}"/>',
        f'<g transform="rotate(-90 {words_x:g} {words_y:g})">',
        text(words_x, words_y, "outcome and newest checkpoint: restart, requeue or stop", size=11),
        "</g>",
    ]


def drawing() -> str:
    whole = 2 * RANK + BETWEEN
    first, last = LEFT, LEFT + RANK + BETWEEN
    ends = HOSTS + STAGE_STEP * len(STAGES) + 36
    return svg(
        WIDTH,
        HEIGHT,
        "Launchers start ranks; each reads, decodes and computes; Horovod sums gradients; rank 0 writes "
        "the run folder, from which a job restarts",
        *start(LEFT, whole),
        *(arrow(left + RANK / 2, LAUNCH + 116, HOSTS) for left in (first, last)),
        *rank("rank 0, first host", first),
        *rank("rank N-1, last host", last),
        *between(
            stage_top(2) + 4, PULSE, "heartbeat (TCP)", "dead and hung ranks", "are named", dashes="6 4"
        ),
        *between(stage_top(4) + 24, WIRE, "Horovod", "gradients, features:", "Gloo, MPI or NCCL"),
        arrow(first + RANK / 2, ends, DISK),
        text(first + RANK / 2 + 50, (ends + DISK) / 2 + 4, "rank 0 writes", size=12),
        *run_folder(LEFT, whole),
        *restart(LEFT + whole),
    )


if __name__ == "__main__":
    FILE.write_text(drawing())
