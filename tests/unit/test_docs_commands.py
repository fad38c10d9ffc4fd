"""Every owt command, option and file of the repository that README.md and docs/ name exists."""

import re
import shlex
from pathlib import Path

import click
import pytest

from horovod_owt.cli import cli

REPO = Path(__file__).parents[2]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"^ {4,}(.*\bowt .*)$", re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
# Of the repository, or of the package; names in capitals stand for any.
FILE = re.compile(r"(?<![\w./~$-])(?:(?:launch|slurm|tests|docs)/[\w*./-]+|[a-z_]+/[\w*]+\.py)(?!\w)")


def shown(page: Path) -> list[list[str]]:
    """The words of each command line in a page's code that has `owt` in it, from there on."""
    text = page.read_text().replace("\\\n", " ")
    prose = FENCE.sub("", text)
    lines = [line for block in FENCE.findall(text) for line in block.splitlines()]
    found = []
    for line in [*lines, *INDENTED.findall(prose), *INLINE.findall(prose)]:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # an apostrophe: no command
            continue
        if "owt" in words[:-1] and not words[words.index("owt") + 1].isupper():
            found.append(words[words.index("owt") + 1 :])
    return found


def complaint(words: list[str]) -> str:
    """What is wrong with the words after `owt`; empty if they are a command with options that it has."""
    command, context, rest = cli, click.Context(cli), list(words)
    while isinstance(command, click.Group) and rest:
        name = rest.pop(0)
        names = name.split("|")  # owt checkpoint list|verify
        if missing := [each for each in names if each not in command.commands]:
            return f"{command.name} has no {missing[0]}"
        command = command.commands[names[0]]
    end = rest.index("--") if "--" in rest else len(rest)
    known = options(command, context) | {"--help"}
    if missing := [word for word in option_words(rest[:end]) if word not in known]:
        return f"{command.name} has no {missing[0]}"
    behind = set() if words[:2] == ["launch", "supervise"] else options(cli.commands["train"], context)
    if behind and (missing := [word for word in option_words(rest[end:]) if word not in behind]):
        return f"train has no {missing[0]}"
    return ""


def options(command: click.Command, context: click.Context) -> set[str]:
    return {name for parameter in command.get_params(context) for name in parameter.opts}


def option_words(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if re.match(r"--\w", word)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_in_the_documents_exist(page):
    assert not [(complaint(words), " ".join(words)) for words in shown(page) if complaint(words)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_in_the_documents_exist(page):
    assert not [name for name in named_files(page) if not any(map(exists, (name, f"horovod_owt/{name}")))]


def named_files(page: Path) -> set[str]:
    text = page.read_text()
    names = (
        name.rstrip(".") for name in FILE.findall(" ".join([*FENCE.findall(text), *INLINE.findall(text)]))
    )
    return {name for name in names if not re.search(r"[A-Z]{3}|_build", name)}


def exists(pattern: str) -> bool:
    return any(True for _ in REPO.glob(pattern))


def test_commands_are_found_in_code_and_wrong_ones_are_told():
    everything = [words for page in PAGES for words in shown(page)]
    assert len(everything) > 100
    assert ["data", "verify", "DATA"] in everything
    assert {"slurm/train.sbatch", "parallel/step.py"} <= set().union(*map(named_files, PAGES))
    assert complaint(["data", "verfy", "DATA"]) == "data has no verfy"
    assert complaint(["job", "submit", "--node", "2", "DATA"]) == "submit has no --node"
    assert complaint(["job", "submit", "DATA", "--", "--rundir", "x"]) == "train has no --rundir"
