"""owt recipe: list and show recipes."""

from __future__ import annotations

import json

import click

from horovod_owt.commands.options import JSON_OPTION
from horovod_owt.config import from_mapping
from horovod_owt.recipe import Recipe, built_in_recipes, load_recipe


@click.group()
def recipe() -> None:
    """List recipes, or show one: its source, the error it should reach, its settings."""


@recipe.command("list")
@JSON_OPTION
def list_command(as_json: bool) -> None:
    """List the built-in recipes.

    \b
    Example:  owt recipe list

    Errors, in percent, are those published for ImageNet by the recipe's source.
    """
    recipes = list(built_in_recipes())
    if as_json:
        click.echo(json.dumps({"recipes": [_document(each) for each in recipes]}))
        return
    rows = [("recipe", "net", "epochs", "global batch", "top-1", "top-5", "summary"), *map(_row, recipes)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@recipe.command()
@click.argument("name", metavar="NAME|FILE")
@JSON_OPTION
def show(name: str, as_json: bool) -> None:
    """Print a recipe as the YAML that `--recipe` takes.

    \b
    Examples:  owt recipe show torch7-55
               owt recipe show torch7-55 > mine.yaml
               owt recipe show mine.yaml --json

    `about` gives its source, global batch, the published error it should reach, whether it was run on
    ImageNet with this package, and how it differs from the source. Settings are validated. --json adds the
    values of all other keys.
    """
    found = load_recipe(name)
    document = _document(found)
    # default: YAML has dates
    click.echo(json.dumps(document, default=str) if as_json else found.text.rstrip("\n"))


def _document(recipe: Recipe) -> dict:
    """The recipe's own values, and the configuration that they make."""
    config = from_mapping(recipe.values).to_dict()
    return {"name": recipe.name, "about": recipe.about, "values": recipe.values, "config": config}


def _row(recipe: Recipe) -> tuple[str, ...]:
    cfg, about = from_mapping(recipe.values), recipe.about
    batch, top1, top5 = (about.get(key, "-") for key in ("global_batch", "top1_error", "top5_error"))
    cells = (recipe.name, cfg.model, cfg.epochs, batch, top1, top5, about.get("summary", "-"))
    return tuple(map(str, cells))
