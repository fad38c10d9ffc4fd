"""What texts tell a user to do exists after `pip install`: commands of owt, not scripts of the checkout."""

import ast
import re
from pathlib import Path

import click
import pytest

import horovod_owt
from horovod_owt.cli import cli

PACKAGE = Path(horovod_owt.__file__).parent
REPO = PACKAGE.parent
# launch/setup makes the environment that the package is in, so it may be named
SCRIPTS = {f"{folder}/{file.name}" for folder in ("launch", "slurm") for file in (REPO / folder).iterdir()}
SCRIPTS -= {"launch/setup"}


def texts(path: Path) -> list[tuple[int, str]]:
    """The strings in a module with their lines, docstrings and the fixed parts of f-strings too."""
    if path.suffix != ".py":
        return list(enumerate(path.read_text().splitlines(), start=1))
    nodes = ast.walk(ast.parse(path.read_text()))
    return [
        (node.lineno, node.value)
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def wrong_in(text: str) -> list[str]:
    """Commands that are none, and scripts that are not installed."""
    wrong = [script for script in sorted(SCRIPTS) if re.search(rf"\b{re.escape(script)}\b", text)]
    for found in re.finditer(r"\bowt ([a-z][a-z-]*)(?: ([a-z][a-z-]*))?", text):
        command = cli.commands.get(found[1])
        if isinstance(command, click.Group):
            command = command.commands.get(found[2]) if found[2] else command
        if command is None:
            wrong.append(found[0])
    return wrong


SOURCES = [path for suffix in ("py", "j2") for path in PACKAGE.rglob(f"*.{suffix}")]


def test_every_command_that_a_text_names_exists_and_no_text_names_a_script_of_the_checkout():
    wrong = {
        f"{path.relative_to(REPO)}:{line}": found
        for path in SOURCES
        for line, text in texts(path)
        if (found := wrong_in(text))
    }
    assert wrong == {}


@pytest.mark.parametrize(
    "text",
    [
        "fix: owt lunch local",
        "see `owt job start`",
        "sbatch slurm/train.sbatch DATA",
        "or launch/supervise, which",
    ],
)
def test_a_text_that_misleads_is_seen(text):
    assert len(wrong_in(text)) == 1


def test_commands_have_an_example_each():
    def leaves(command, path):
        if not isinstance(command, click.Group):
            return [(path, command)]
        return [leaf for name, each in command.commands.items() for leaf in leaves(each, f"{path} {name}")]

    for path, command in leaves(cli, "owt"):
        example = rf"Examples?: .*\b{re.escape(path)}\b"
        assert command.hidden or re.search(example, command.help, re.DOTALL), f"{path}: {command.help}"
