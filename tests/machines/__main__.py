"""Prove setup on other machines: fresh Debian roots, used as a new user would.

A cell is one machine, one way to use it, and how that ought to end: a quickstart that learns, or one line
that names the fix. Each runs in namespaces of its own and is thrown away; Debian's roots, packages, logs and
results are kept in ~/.cache/horovod_owt/machines. Wants root, debootstrap, and 20 GB of free disk.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machines import host, results  # noqa: E402
from machines.cells import CELLS, SUITES, Cell  # noqa: E402
from machines.machine import Ended, say  # noqa: E402
from machines.trial import Trial  # noqa: E402
from machines.workshop import Workshop  # noqa: E402


def main() -> int:
    args = parse_arguments()
    workshop = Workshop(args.folder)
    if args.list:
        for cell in CELLS.values():
            print(f"{cell.name:<22}{SUITES[cell.suite]:<12}{', '.join(cell.stages):<20}{cell.what}")
        return 0
    if args.table or args.write:
        return show(workshop, args.write)
    if why := host.lacking():
        say(f"{why}{'; no other machine was tried' if args.if_possible else ''}")
        return 0 if args.if_possible else 2
    with workshop.locked():
        if not args.keep:
            workshop.forget()
        try:
            workshop.check_room()
            done = run_cells(workshop, with_starts(workshop, args.cells), args.keep)
        except Ended as fault:  # no room, or no Debian root: the network, a mirror
            if not args.if_possible:
                raise
            say(f"{fault}; no other machine was tried")
            return 0
    print(results.text(done))
    return 0 if all(result.as_wanted for result in done) else 1


def run_cells(workshop: Workshop, cells: Sequence[Cell], keep: bool) -> list[results.Result]:
    """Run the cells in order; a machine is kept while a later cell starts from it, or for a later run."""
    commit, pip, done = workshop.clone_checkout(), host.pip(), []
    try:
        for at, cell in enumerate(cells):
            result = Trial(workshop, cell, pip).run(commit)
            say(f"{cell.name}: {results.outcome(result)}")
            results.keep(workshop.folder / "results", result)
            done.append(result)
            if keep and cell.name in {other.start for other in CELLS.values()}:
                workshop.keep(cell)
            workshop.clean({cell.name, *(later.start for later in cells[at + 1 :])} - {None})
    finally:
        workshop.clean(set())
    return done


def with_starts(workshop: Workshop, names: Sequence[str]) -> list[Cell]:
    """The cells of these names, each after the one that it starts from unless that one's machine is kept."""
    chosen = {}
    for name in names or CELLS:
        start = CELLS[name].start
        if start is not None and not workshop.keeps(start):
            chosen[start] = CELLS[start]
        chosen[name] = CELLS[name]
    return list(chosen.values())


def show(workshop: Workshop, document: Path | None) -> int:
    """Print the last result of every cell, or write them into a document."""
    kept = results.kept(workshop.folder / "results")
    if document is None:
        print(results.text(kept))
    else:
        results.write_into(document, kept)
    return 0


def parse_arguments() -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser("make test-machines", description=summary, epilog=rest)
    parser.add_argument("cells", nargs="*", metavar="CELL", help="default: all, some hours")
    parser.add_argument("--list", action="store_true", help="print the cells and run none")
    parser.add_argument(
        "--table", action="store_true", help="print the last result of every cell and run none"
    )
    parser.add_argument(
        "--write", type=Path, metavar="FILE.md", help="the same, into a document's place for it"
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep finished machines, 7 GB each, for later runs to start from; without it they are removed",
    )
    parser.add_argument(
        "--if-possible", action="store_true", help="where no machine can be made, say so and succeed"
    )
    args = parser.parse_args()
    if unknown := [name for name in args.cells if name not in CELLS]:
        parser.error(f"no cell named {', '.join(unknown)}: --list has them all")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    args.folder = cache / "horovod_owt" / "machines"
    return args


def interrupted(signum: int, _frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(signum).name)


if __name__ == "__main__":
    for end in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # INT too: a shell's `&` has it ignored
        signal.signal(end, interrupted)
    try:
        sys.exit(main())
    except (Ended, OSError) as fault:
        say(str(fault))
        sys.exit(1)
    except KeyboardInterrupt:
        say("interrupted; nothing is left running or mounted")
        sys.exit(130)
