"""Sphinx extension: reference pages generated from the code at each build, so that they cannot drift.

    {config-keys}   every key of TrainConfig: type or choices, default, and the comment beside it
    {recipes}       the keys that each recipe of the package sets
    {recipe-origins}  where each comes from, and the error that it should come to

sphinx-click makes the command line reference and autodoc the API reference. Both expect reStructuredText, and
our docstrings are plain text: they are converted on the way.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import textwrap
import tokenize
from dataclasses import dataclass

import click
from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from horovod_owt.config import CHOICES, FIELDS, TrainConfig
from horovod_owt.recipe import ABOUT, built_in_recipes


@dataclass(frozen=True)
class Key:
    """One configuration key, as the reference shows it."""

    name: str
    values: str  # its type, or the values that it may have
    default: str
    meaning: str


def config_keys() -> list[Key]:
    """The keys of TrainConfig in its order; the meaning is the comment in the source."""
    source = textwrap.dedent(inspect.getsource(TrainConfig))
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    keys = []
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            name, lines = node.target.id, range(node.lineno, node.end_lineno + 1)
            values = " | ".join(CHOICES.get(name, (FIELDS[name].type,)))
            default = str(FIELDS[name].default)
            default = default.lower() if FIELDS[name].type == "bool" else default
            keys.append(Key(name, values, default, " ".join(comments[n] for n in lines if n in comments)))
    return keys


class ConfigKeys(Directive):
    """A table of all configuration keys."""

    def run(self) -> list[nodes.Node]:
        head = ("key", "values", "default", "meaning")
        rows = [(key.name, key.values, key.default, key.meaning) for key in config_keys()]
        return [table(head, rows, widths=(3, 3, 2, 8))]


class Recipes(Directive):
    """A table of the recipes: a row for each key that one of them sets."""

    def run(self) -> list[nodes.Node]:
        recipes = {recipe.name: recipe.values for recipe in built_in_recipes()}
        keys = [name for name in FIELDS if any(name in values for values in recipes.values())]
        rows = [(key, *(str(values.get(key, "")) for values in recipes.values())) for key in keys]
        return [table(("key", *recipes), rows, widths=(2, *(3 for _ in recipes)))]


class RecipeOrigins(Directive):
    """For each recipe what its file says of it."""

    def run(self) -> list[nodes.Node]:
        found = []
        for recipe in built_in_recipes():
            rows = [(key, _words(recipe.about[key])) for key in ABOUT if key in recipe.about]
            found.append(nodes.rubric("", recipe.name))
            found.append(table(("key", "meaning"), rows, widths=(2, 8)))
        return found


def _words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "; ".join(value) if isinstance(value, list) else str(value)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]], widths: tuple[int, ...]) -> nodes.table:
    """All cells are code, except those of the column `meaning`."""
    group = nodes.tgroup(cols=len(head))
    group += [nodes.colspec(colwidth=width) for width in widths]
    group += nodes.thead("", _row(head, [nodes.Text] * len(head)))
    cells = [nodes.Text if name == "meaning" else _code for name in head]
    group += nodes.tbody("", *(_row(row, cells) for row in rows))
    return nodes.table("", group)


def _row(texts: tuple[str, ...], cells: list) -> nodes.row:
    paragraphs = (nodes.paragraph("", "", cell(text)) for text, cell in zip(texts, cells, strict=True))
    return nodes.row("", *(nodes.entry("", paragraph) for paragraph in paragraphs))


def _code(text: str) -> nodes.Node:
    return nodes.literal(text, text) if text else nodes.Text("")


def plain_docstring(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Hand a docstring to autodoc as reStructuredText."""
    lines[:] = as_rst("\n".join(lines)).split("\n")


def plain_help(app: Sphinx, context: click.Context, lines: list[str]) -> None:
    """The same for a command's help, whose unwrapped blocks come from sphinx-click with bars."""
    text = "\n".join(f" {line[2:]}" if line.startswith("| ") else line for line in lines)
    lines[:] = as_rst(text).split("\n")


def as_rst(text: str) -> str:
    """Plain text: `x` becomes code, blocks with columns or indentation are kept as they are."""
    blocks = []
    for block in re.split(r"\n\s*\n", text):
        if re.search(r"^ |\S {2,}\S", block, re.MULTILINE):
            blocks.append("::\n\n" + textwrap.indent(textwrap.dedent(block), "    "))
        else:
            words = re.sub(r"([*|]|_\b)", r"\\\1", block)
            blocks.append(re.sub(r"`([^`]+)`", lambda code: f"``{_unescaped(code[1])}``", words))
    return "\n\n".join(blocks)


def _unescaped(text: str) -> str:
    return text.replace("\\", "")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("config-keys", ConfigKeys)
    app.add_directive("recipes", Recipes)
    app.add_directive("recipe-origins", RecipeOrigins)
    app.connect("autodoc-process-docstring", plain_docstring)
    app.connect("sphinx-click-process-description", plain_help)
    return {"parallel_read_safe": True}
