"""Options as TOML: what a run records of itself, and files of options that people write."""

from __future__ import annotations

import dataclasses
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from dino.errors import first_line
from dino.options import flatten_names, replace
from dino.options.train import TrainOptions

# A run has always recorded these: the first, and one of each later section that it needs.
COMPLETE = ("epochs", "model.arch", "head.hidden_dim", "views.global_size", "optim.lr", "log.keep")


def to_dict(options: Any) -> dict[str, Any]:
    """Options as nested dictionaries without unset values: what `config.toml` holds."""
    return dataclasses.asdict(options, dict_factory=lambda items: {k: v for k, v in items if v is not None})


def read_packaged(name: str) -> dict[str, Any]:
    """The content of a TOML file of this package, e.g. "options/recipes.toml"."""
    return tomllib.loads(resources.files("dino").joinpath(name).read_text(encoding="utf-8"))


def _read_values(path: Path) -> dict[str, Any]:
    """What a TOML file says, by dotted name."""
    if not path.is_file():
        raise ValueError(f"there is no options file '{path}'.")
    try:
        return flatten_names(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a valid TOML file: {first_line(error)}.") from error


def _apply(path: Path, base: TrainOptions, values: dict[str, Any]) -> TrainOptions:
    try:
        return replace(base, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_toml(path: Path) -> TrainOptions:
    """The options a TOML file gives. The others are at their defaults, or those of the run that it resumes.

    Raises:
        ValueError: there is no such file, or it is no TOML, or it holds an unknown option or a value that breaks its rule.
    """
    values = _read_values(path)
    resumed = values.get("resume")
    return _apply(path, read_recorded(resumed) if isinstance(resumed, str) else TrainOptions(), values)


def read_recorded(run: str) -> TrainOptions:
    """The options that the run in directory `run` was started with, without those that held for one call only."""
    path = Path(run).expanduser() / "config.toml"
    if not path.is_file():
        raise ValueError(f"{run} holds no run (no config.toml); give the --out folder of a run.")
    recorded = _read_values(path)
    if "log.tensorboard" in recorded:  # of version 0.1
        recorded["log.to"] = ["tensorboard"] if recorded.pop("log.tensorboard") else []
    options = _apply(path, TrainOptions(), recorded | dict.fromkeys(("resume", "stop_after")))
    if missing := [name for name in COMPLETE if name not in recorded]:
        raise ValueError(f"{path} is cut short: it does not say {missing[0]}; copy it from a backup.")
    return options
