"""Train small nets in every way and compare their accuracy; the table goes to docs/accuracy.md.

What is done is kept, so that a second start continues.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from accuracy import images, table  # noqa: E402
from accuracy.cells import DATA, Cell, cells  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="make accuracy", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/accuracy"), help="data and results")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no cell after that time")
    parser.add_argument("--ranks", type=int, choices=(1, 2), help="only cells of so many ranks")
    parser.add_argument("--write", action="store_true", help="write the table of what is done, train nothing")
    args = parser.parse_args()
    if not args.write:
        train(args.folder, time.time() + 60 * args.minutes, args.ranks)
    table.write(args.folder)
    return 0


def train(folder: Path, until: float, ranks: int | None) -> None:
    (folder / "results").mkdir(parents=True, exist_ok=True)
    for name in DATA:
        images.make(name, folder / "data")
    for size in (1, 2):
        todo = [cell for cell in cells() if cell.ranks == size and not done(folder, cell)]
        if todo and ranks in (None, size) and time.time() < until:
            run(folder, until, size, todo)


def done(folder: Path, cell: Cell) -> bool:
    return (folder / "results" / f"{cell.name}.json").exists()


def run(folder: Path, until: float, ranks: int, todo: list[Cell]) -> None:
    launcher = ["horovodrun", "--gloo", "-np", str(ranks)] if ranks > 1 else []
    what = json.dumps([[cell.way, cell.data, cell.seed, cell.plateau] for cell in todo])
    subprocess.run(
        [*launcher, sys.executable, str(HERE / "rank.py"), str(folder.resolve()), str(until), what],
        check=True,
    )


if __name__ == "__main__":
    sys.exit(main())
