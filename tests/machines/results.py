"""What came of a cell, read from its log, kept as JSON, and shown as a table."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from machines.cells import CELLS, SUITES, WANTED_TOP1, Cell

BEGIN, END = "<!-- machines: written by make test-machines -->", "<!-- /machines -->"


@dataclass(frozen=True)
class Result:
    cell: str
    date: str
    commit: str
    as_wanted: bool
    exit_code: int | None  # None: not run, and the line says why
    line: str  # that it ended with
    versions: Mapping[str, str] = field(default_factory=dict)  # debian, compiler, cmake, python, mpi
    seconds: Mapping[str, int] = field(default_factory=dict)  # pip, build, quickstart; setup, tests
    top1: float | None = None  # percent
    tests: str = ""  # pytest's own count

    @classmethod
    def not_run(cls, cell: str, date: str, commit: str, why: str, as_wanted: bool = True) -> "Result":
        return cls(cell, date, commit, as_wanted, None, why)


def judge(
    cell: Cell, date: str, commit: str, code: int, seconds: Mapping[str, int], said: str, seen: str
) -> Result:
    """The result of a cell from the output of its stages (said) and of the look at its versions (seen)."""
    code = exit_code_in(said, code)
    line = ending(said)
    top1 = [float(percent) for percent in re.findall(r"^validation top-1\s+([\d.]+) %", said, re.MULTILINE)]
    tests = re.findall(r"^=* ?(\d+ (?:passed|failed).*?) in [\d.]+s", said, re.MULTILINE)
    if cell.refused is None:
        as_wanted = code == 0 and ("quickstart" not in cell.stages or top1[-1:] >= [WANTED_TOP1])
    else:
        as_wanted = code == 2 and cell.refused in line
    return Result(
        cell.name,
        date,
        commit,
        as_wanted,
        code,
        line,
        versions_in(said, seen),
        seconds_in(said, seconds),
        top1[-1] if top1 else None,
        tests[-1] if tests else "",
    )


def exit_code_in(said: str, code: int) -> int:
    """That of the command that make ran: make's own is 2 whatever went wrong."""
    found = re.findall(r"^make: \*\*\* \[.*\] Error (\d+)$", said, re.MULTILINE)
    return int(found[-1]) if found and code != 0 else code


def ending(said: str) -> str:
    """The last line that setup or the program said, without make's and without the progress."""
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith("make: ")]
    return lines[-1] if lines else ""


def seconds_in(said: str, stages: Mapping[str, int]) -> dict[str, int]:
    """What setup and quickstart say that their parts took, and the stages as they were timed."""
    found = dict(stages)
    for name, pattern in {
        "pip": r"^setup: pip .*: done in (\d+) s",
        "build": r"^setup: building Horovod .*: done in (\d+) s",
        "quickstart": r"^time .* (\d+) s in all",
    }.items():
        parts = [int(number) for number in re.findall(pattern, said, re.MULTILINE)]
        if parts:
            found[name] = sum(parts)
    return found


def versions_in(said: str, seen: str) -> dict[str, str]:
    """Versions as setup says that it used them, else as the machine's tools give them."""
    found = dict(re.findall(r"^(\w+): (.+)$", seen, re.MULTILINE))
    for name, title in {"compiler": "compiler", "python": "Python", "mpi": "MPI, mpi4py"}.items():
        used = re.findall(rf"^{title}  +(\S.*)$", said, re.MULTILINE)
        if used and not (name == "mpi" and name in found):  # MPICH's first line names no version
            found[name] = used[-1]
    return {name: short(text) for name, text in found.items()}


def short(version: str) -> str:
    """`g++-14 (Debian 14.2.0-19) 14.2.0` -> `g++ 14.2.0`, and the like for the other tools."""
    for pattern, shown in (
        (r".*clang version ([\d.]+).*", r"clang \1"),
        (r"[cg]\+\+\S* \(.*?\) ([\d.]+).*", r"g++ \1"),
        (r"cmake version ([\d.]+).*", r"\1"),
        (r"Python ([\d.]+).*", r"\1"),
        (r"mpirun \(Open MPI\) (\S+)( from pip)?.*", r"Open MPI \1\2"),
        (r"Version: +(\S+)", r"MPICH \1"),
    ):
        if re.fullmatch(pattern, version):
            return re.sub(pattern, shown, version)
    return version


# kept as JSON, one file a cell


def keep(folder: Path, result: Result) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"{result.cell}.json.new"
    beside.write_text(json.dumps(asdict(result), indent=1, ensure_ascii=False) + "\n")
    beside.replace(folder / f"{result.cell}.json")


def kept(folder: Path) -> list[Result]:
    """The last result of every cell, in the order of the cells; one that has none says so."""
    files = {name: folder / f"{name}.json" for name in CELLS}
    return [
        Result(**json.loads(file.read_text())) if file.exists() else Result.not_run(name, "-", "-", "-")
        for name, file in files.items()
    ]


# as a table


HEAD = (
    "Cell",
    "Machine",
    "Compiler",
    "CMake",
    "Python",
    "MPI",
    "Exit",
    "pip, build, quickstart",
    "Ended with",
    "Date",
)


def row(result: Result) -> tuple[str, ...]:
    cell, versions = CELLS[result.cell], result.versions
    times = [result.seconds.get(name) for name in ("pip", "build", "quickstart")]
    shown = ", ".join("-" if second is None else str(second) for second in times)
    return (
        result.cell,
        f"{SUITES[cell.suite]}: {cell.what}",
        *(versions.get(name, "-") for name in ("compiler", "cmake", "python", "mpi")),
        "not run" if result.exit_code is None else f"{result.exit_code}{'' if result.as_wanted else ' (!)'}",
        "-" if set(times) == {None} else f"{shown} s",
        outcome(result),
        result.date,
    )


def outcome(result: Result) -> str:
    """What it ended with, for the table: how well it trained and what its tests said, else its last line."""
    parts = [f"top-1 {result.top1:.1f} %"] if result.top1 is not None else []
    if result.tests:
        parts.append(result.tests)
    elif result.exit_code != 0:
        parts.append(result.line.removeprefix("setup: "))
    return ", ".join(parts) or "set up, proved"


def text(results: Iterable[Result]) -> str:
    rows = [HEAD, *map(row, results)]
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(HEAD))]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(cells, widths, strict=True)).rstrip()
        for cells in rows
    )


def markdown(results: Sequence[Result], earlier: str = "") -> str:
    """A table of one row a cell; a cell without a result here keeps its row of the `earlier` table."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(word.replace('|', chr(92) + '|') for word in cells)} |"

    rows = {old.split(" | ")[0].removeprefix("| "): old for old in earlier.splitlines()}
    for result in results:
        if result.exit_code is not None or result.cell not in rows:
            rows[result.cell] = line(row(result))
    return "\n".join([line(HEAD), line(["---"] * len(HEAD)), *(rows[result.cell] for result in results)])


def write_into(document: Path, results: Sequence[Result]) -> None:
    """Write the table between the two marks of a document, over that of earlier runs, also on other hosts."""
    before, begin, rest = document.read_text().partition(BEGIN)
    old, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{document} has no place for the table: lines {BEGIN} and {END} are wanted")
    table = markdown(results, old)
    beside = document.with_name(f"{document.name}.new")
    beside.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")
    beside.replace(document)
