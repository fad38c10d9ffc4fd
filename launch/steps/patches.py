"""Apply patches to one source tree: every hunk exactly at its line, or nothing is written.

`patch` would search for a matching place; that could give a Horovod that nobody has tested. Each patch is
made against the released source, independent of the others; they are merged by that source's line numbers.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from steps.process import Failed

HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@")


@dataclass(frozen=True)
class Hunk:
    patch: str  # file name
    file: str  # relative to the source tree
    start: int  # line number in the released file, from 1
    old: list[str]
    new: list[str]

    @property
    def end(self) -> int:
        return self.start + len(self.old)


def apply(patches: Iterable[Path], folder: Path) -> list[Path]:
    """Apply the patches in folder (`-p1`, existing text files only); returns the changed files.

    Raises Failed, with nothing written, if a patch does not match its file or two patches overlap.
    """
    hunks: dict[str, list[Hunk]] = {}
    for patch in patches:
        found = list(_hunks(patch))
        if not found:
            raise Failed(f"{patch.name} changes no file")
        for hunk in found:
            hunks.setdefault(hunk.file, []).append(hunk)
    texts = {folder / file: _merged(folder / file, hunks[file]) for file in hunks}
    for target, text in texts.items():
        target.write_text(text, encoding="utf-8")
    return list(texts)


def _merged(target: Path, hunks: list[Hunk]) -> str:
    """The text of a file with these hunks applied."""
    hunks = sorted(hunks, key=lambda hunk: hunk.start)
    if not target.is_file():
        raise Failed(f"{hunks[0].patch}: {target} does not exist")
    lines = target.read_text(encoding="utf-8").splitlines(keepends=True)
    for one, other in zip(hunks, hunks[1:], strict=False):
        if other.start < one.end:
            raise Failed(f"{one.patch} and {other.patch} both change {target} at line {other.start}")
    for hunk in reversed(hunks):  # from the end, so that the lines before keep their numbers
        at = slice(hunk.start - 1, hunk.end - 1)
        if lines[at] != hunk.old:
            raise Failed(f"{hunk.patch} does not apply to {target} at line {hunk.start}")
        lines[at] = hunk.new
    return "".join(lines)


def _hunks(patch: Path) -> Iterator[Hunk]:
    lines = iter(patch.read_text(encoding="utf-8").splitlines(keepends=True))
    file = ""
    for line in lines:
        if line.startswith("+++ b/"):
            file = line[len("+++ b/") :].split("\t")[0].rstrip("\n")
        elif found := HUNK.match(line):
            start, old_count, new_count = (int(number or 1) for number in found.groups())
            yield Hunk(patch.name, file, start, *_sides(lines, old_count, new_count))


def _sides(lines: Iterator[str], old_count: int, new_count: int) -> tuple[list[str], list[str]]:
    """The old and new lines of a hunk, from an iterator just after the @@ line."""
    old, new = [], []
    while len(old) < old_count or len(new) < new_count:
        line = next(lines)
        text = line[1:] or "\n"  # an editor may have stripped the blank of an empty context line
        if line[0] in " -\n":
            old.append(text)
        if line[0] in " +\n":
            new.append(text)
    return old, new
