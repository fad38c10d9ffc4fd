"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from horovod_owt.files import users_path


class UsersPath(click.Path):
    """A path as users write it; an empty one, of a variable that is not set, would be the current folder."""

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("an empty path: is a variable not set?", param, ctx)
        return super().convert(users_path(value), param, ctx)


SET_OPTION = click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a config key; may be repeated."
)
PARALLEL_OPTION = click.option(
    "--parallel",
    type=click.Choice(["data", "hybrid", "auto"]),
    help="data: every rank holds the whole model. hybrid: One Weird Trick, the ranks of a node split the "
    "fully connected layers. auto: the one predicted to be faster.  [default: data]",
)
RECIPE_OPTION = click.option(
    "--recipe", metavar="NAME|FILE", help="Recipe to start from.  [default: torchvision-90]"
)
NEWEST_OPTION = click.option(
    "--newest",
    is_flag=True,
    help="Use a run's newest checkpoint instead of its best by validation.",
)
JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="Print one JSON document to stdout.")


def with_profile(profile: int | None, timeline: bool, settings: tuple[str, ...]) -> tuple[str, ...]:
    """`--profile 10` is short for `--set profile=10`, and `--timeline` for `--set timeline=true`."""
    settings = settings if profile is None else (*settings, f"profile={profile}")
    return (*settings, "timeline=true") if timeline else settings


def with_parallel(parallel: str | None, settings: tuple[str, ...]) -> tuple[str, ...]:
    """`--parallel hybrid` is short for `--set parallel=hybrid`."""
    return (*settings, f"parallel={parallel}") if parallel else settings
