"""Named complete configurations, read from recipes.toml, and the choice of what a run starts from."""

from __future__ import annotations

import mimetypes
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dino import errors
from dino.options import flatten_names, replace
from dino.options.toml import read_packaged, read_recorded, read_toml
from dino.options.train import AUTO, TrainOptions


class Recipe(NamedTuple):
    about: str
    command: str
    hardware: str
    expected: str
    options: TrainOptions


_TABLES = read_packaged("options/recipes.toml")


def list_changes(names: Sequence[str]) -> dict[str, Any]:
    """What tables of recipes.toml change in the default options, one after the other, with their bases."""
    changes: dict[str, Any] = {}
    for name in names:
        table = _TABLES[name]
        changes |= list_changes(table.get("base", ()))
        changes |= dict.fromkeys(table.get("unset", ())) | flatten_names(table.get("options", {}))
    return changes


def _read_recipe(name: str) -> Recipe:
    table, options = _TABLES[name], replace(TrainOptions(), list_changes([name]))
    return Recipe(table["about"], table["command"], table["hardware"], table["expected"], options)


RECIPES = {name: _read_recipe(name) for name, table in _TABLES.items() if "about" in table}


def find_recipe(name: str) -> Recipe:
    return errors.look_up("recipe", name, RECIPES)


def free_length(base: TrainOptions, given: Mapping[str, Any]) -> TrainOptions:
    """`base` without its own length where `given`, the options that replace its own, say another one.

    A time also replaces the epochs of its schedules, which are chosen for the epochs that fit into it.
    """
    named = {name for name, value in given.items() if value is not None}
    if given.get("resume") not in (None, AUTO):
        return base
    free = {"minutes", "hours"} if "epochs" in named else set()
    if {"minutes", "hours"} & named:
        free |= {"minutes", "hours", "epochs", "optim.warmup_epochs", "method.teacher_temp_epochs"}
    return replace(base, dict.fromkeys(free))


def choose_base(
    recipe: str | os.PathLike[str] | None, has_data: bool = True, resume: str | None = None, how: str = "--data {}"
) -> TrainOptions:
    """The options that flags or keywords change: a recipe's, a TOML file's, or those of the run to resume.

    Without any of them it is the demo, or, where the data is given, options that are chosen for it.

    Args:
        how: how to train on images, for the error where they are given in place of a recipe.

    Raises:
        ValueError: there is no such recipe, file or run, or both a recipe and a run are given.
    """
    if resume is not None and "://" in os.fspath(resume):
        raise ValueError(f"--resume {resume} is an address; write --out {resume} --resume auto.")
    if resume not in (None, AUTO):
        if recipe is not None:
            raise ValueError(f"--resume continues a run with its own options; leave '{recipe}' out.")
        return read_recorded(resume)
    if recipe is None:
        return TrainOptions() if has_data else find_recipe("demo").options
    recipe = os.fspath(recipe)
    if recipe.endswith(".toml"):
        return read_toml(Path(recipe))
    if recipe not in RECIPES and ((path := Path(recipe)).exists() or "/" in recipe):
        is_image = path.is_file() and (mimetypes.guess_type(path)[0] or "").startswith("image/")
        raise ValueError(
            f"'{recipe}' is not a recipe; to train on images write: {how.format(path.parent if is_image else recipe)}"
        )
    return find_recipe(recipe).options
