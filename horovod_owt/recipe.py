"""Recipes: YAML files of configuration keys; `about` says where they come from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from horovod_owt.errors import ConfigError
from horovod_owt.files import read_user_text
from horovod_owt.text import nearest

DEFAULT_RECIPE = "torchvision-90"
ABOUT = {  # the keys of `about`, and their meaning
    "summary": "one line",
    "source": "where the recipe comes from",
    "global_batch": "images per optimizer update in the source",
    "top1_error": "published top-1 error on ImageNet's validation set, percent",
    "top5_error": "published top-5 error, percent",
    "error_source": "who published the errors, or why there are none",
    "run_on_imagenet": "whether this package was run on ImageNet with the recipe",
    "differences": "a list of differences from the source",
}


@dataclass(frozen=True)
class Recipe:
    """The content of a recipe file."""

    name: str
    values: dict[str, Any]  # by configuration key
    about: dict[str, Any]  # by some keys of ABOUT
    text: str


class _KeyTwice(yaml.MarkedYAMLError):
    pass


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML's own would take the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _KeyTwice(problem=key.value, problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, what: str) -> Any:
    """A document that a user wrote; raises ConfigError."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2026-13-45
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        saw = f"has {error.problem} twice, again" if isinstance(error, _KeyTwice) else "is not valid YAML"
        raise ConfigError(f"{what} {saw}{line}", wanted="key: value lines") from None


def recipe_names() -> list[str]:
    return sorted(
        Path(item.name).stem
        for item in resources.files("horovod_owt.recipes").iterdir()
        if item.name.endswith(".yaml")
    )


def built_in_recipes() -> Iterator[Recipe]:
    return map(load_recipe, recipe_names())


def load_recipe(name_or_file: str) -> Recipe:
    """A built-in recipe or a YAML file; raises ConfigError."""
    if name_or_file in recipe_names():
        text = (resources.files("horovod_owt.recipes") / f"{name_or_file}.yaml").read_text(encoding="utf-8")
    elif os.path.exists(name_or_file):
        text = read_user_text(Path(name_or_file), wanted="a YAML file of key: value lines")
    else:
        raise ConfigError(
            f"recipe {name_or_file!r} is neither a built-in recipe nor a file",
            wanted=f"one of {', '.join(recipe_names())} or a path",
            fix=f"use {nearest(name_or_file, recipe_names()) or DEFAULT_RECIPE}, see `owt recipe list`",
        )
    values = parse_yaml(text, f"recipe {name_or_file}")
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"contains a {type(values).__name__}"
        raise ConfigError(f"recipe {name_or_file} {found}", wanted="key: value lines")
    return Recipe(name_or_file, values, _about(name_or_file, values.pop("about", {})), text)


def _about(name: str, about: Any) -> dict[str, Any]:
    if not isinstance(about, dict):
        raise ConfigError(
            f"about of recipe {name} is {str(about)[:40]!r}", wanted="key: value lines below it"
        )
    for key in about:
        if key not in ABOUT:
            near = nearest(key, ABOUT)
            raise ConfigError(
                f"unknown key {key!r} in about of recipe {name}",
                wanted=f"one of {', '.join(ABOUT)}",
                fix=f"use {near}" if near else "",
            )
    return about
