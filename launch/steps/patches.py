"""Apply a patch as it stands: every line of context where the hunk says, or nothing is written.

`patch` would look around, shift and guess; here a guess would be a Horovod that nobody has tested.
"""

import re
from pathlib import Path

from steps.process import Failed

HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@")


def apply(patch: Path, folder: Path) -> list[Path]:
    """Change files in folder as the patch says (`-p1`, existing text files only); the files that changed."""
    changed: dict[Path, list[str]] = {}
    lines = iter(patch.read_text().splitlines(keepends=True))
    for line in lines:
        if line.startswith("+++ b/"):
            target = folder / line[len("+++ b/") :].split("\t")[0].rstrip("\n")
            if not target.is_file():
                raise Failed(f"{patch.name}: {target} is not there")
            changed[target] = target.read_text().splitlines(keepends=True)
            shift = 0  # lines that earlier hunks of this file have added
        elif found := HUNK.match(line):
            start, old_count, new_count = (int(number or 1) for number in found.groups())
            old, new = _hunk(lines, old_count, new_count)
            at = start - 1 + shift
            if changed[target][at : at + len(old)] != old:
                raise Failed(f"{patch.name} does not apply to {target} at line {start}")
            changed[target][at : at + len(old)] = new
            shift += len(new) - len(old)
    if not changed:
        raise Failed(f"{patch.name} changes no file")
    for target, text in changed.items():
        target.write_text("".join(text))
    return list(changed)


def _hunk(lines, old_count: int, new_count: int) -> tuple[list[str], list[str]]:
    """The lines before and after, taken from an iterator that stands behind the @@ line."""
    old, new = [], []
    while len(old) < old_count or len(new) < new_count:
        line = next(lines)
        text = line[1:] or "\n"  # an editor may have cut the blank off an empty line of context
        if line[0] in " -\n":
            old.append(text)
        if line[0] in " +\n":
            new.append(text)
    return old, new
