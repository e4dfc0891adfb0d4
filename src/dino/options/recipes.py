"""Named complete configurations, read from recipes.toml, and the choice of what a run starts from."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from dino import errors
from dino.options import flatten_names, replace
from dino.options.toml import read_recorded, read_toml
from dino.options.train import TrainOptions

# What the paper compares DINO with, as changes to it (Tables 2, 7, 14 and 15).
NO_MOMENTUM: dict[str, Any] = {"method.teacher": "student", "method.momentum": None}
BYOL: dict[str, Any] = {
    "method.loss": "mse",
    "method.targets": "none",
    "head.prototypes": False,
    "head.predictor": True,
    "head.batch_norm": True,
}
MOCO: dict[str, Any] = {
    "method.loss": "infonce",
    "method.targets": "none",
    "method.student_temp": 0.2,
    "head.prototypes": False,
}
SWAV: dict[str, Any] = NO_MOMENTUM | {"method.targets": "sinkhorn"}
_COMPARED = {"byol_vit_small": BYOL, "mocov2_vit_small": MOCO, "swav_vit_small": SWAV}


class Recipe(NamedTuple):
    about: str
    command: str
    hardware: str
    expected: str
    options: TrainOptions


def _read_recipes() -> dict[str, Recipe]:
    tables = tomllib.loads(Path(__file__).with_name("recipes.toml").read_text(encoding="utf-8"))
    bases, recipes = {"": TrainOptions()}, {}
    for name, table in tables.items():
        changes = flatten_names(table.pop("options", {})) | dict.fromkeys(table.pop("unset", ()))
        bases[name] = replace(bases[table.pop("base", "")], changes | _COMPARED.get(name, {}))
        if table:
            recipes[name] = Recipe(**table, options=bases[name])
    return recipes


RECIPES = _read_recipes()


def find_recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise errors.unknown("recipe", name, RECIPES)
    return RECIPES[name]


def choose_base(
    recipe: str | None, has_data: bool = True, resume: str | None = None, command: str = "train"
) -> TrainOptions:
    """The options that flags or keywords change: a recipe's, a TOML file's, or those of the run to resume.

    Without any of them it is the demo, or, where the data is given, options that are chosen for it.

    Raises:
        ValueError: there is no such recipe, file or run, or both a recipe and a run are given.
    """
    if resume is not None:
        if recipe is not None:
            raise ValueError(f"--resume continues a run with its own options; leave '{recipe}' out.")
        return read_recorded(resume)
    if recipe is None:
        return TrainOptions() if has_data else find_recipe("demo").options
    if recipe.endswith(".toml"):
        return read_toml(Path(recipe))
    if recipe not in RECIPES and Path(recipe).exists():
        raise ValueError(f"'{recipe}' is not a recipe; to train on it write: dino {command} --data {recipe}")
    return find_recipe(recipe).options
