"""Sentences about what went wrong that several modules say."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def unknown(what: str, name: str, known: Iterable[str]) -> ValueError:
    """'There is no WHAT NAME', with what there is, the nearest first."""
    known = list(known)
    return ValueError(f"there is no {what} '{name}'; known are {', '.join(known)}.{did_you_mean(name, known)}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence with the known name that is most like `name`; "" if none is."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


def unwritable(path: Path, error: OSError) -> ValueError:
    """Of the place that --out names."""
    return ValueError(f"--out {path} cannot be written ({error.strerror or error}); choose another.")


def first_line(error: BaseException) -> str:
    """What an error of another library says, to be put into a sentence of ours."""
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def import_optional(module: str, need: str, extra: str) -> Any:
    """A module of a package that only some need, as `need` says ("video needs PyAV").

    Raises:
        ValueError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{need}; install it with: pip install 'dino[{extra}]'") from error
