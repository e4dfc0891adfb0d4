"""Errors whose sentences several modules need."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class TrainingError(Exception):
    """A run had to end early; the message says why and how to go on."""


def unknown(what: str, name: str, known: Iterable[str]) -> ValueError:
    """There is no `what` called `name`; the sentence lists the `known` ones and suggests the nearest."""
    known = list(known)
    return ValueError(f"there is no {what} '{name}'; known are {', '.join(known)}.{did_you_mean(name, known)}")


def look_up(what: str, name: str, known: Mapping[Any, T]) -> T:
    """The `what` called `name`, of those that are `known`; raises `unknown`."""
    if name not in known:
        raise unknown(what, name, known)
    return known[name]


# Words of other programs. "gpu" would be near to another word, "cpu".
SYNONYMS = {
    "gpu": "cuda",
    "learning_rate": "lr",
    "bs": "batch_size",
    "image_size": "global_size",
    "workers": "num_workers",
}


class NotFinite(ValueError):
    """A model computes numbers that are not finite."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that suggests the known name nearest to `name`; "" if none is near."""
    known, meant = [*known], SYNONYMS.get(name, name)
    near = [each for each in known if each.lower() == meant.lower()] or difflib.get_close_matches(meant, known, n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


def unwritable(path: Path, error: OSError) -> ValueError:
    """`path`, which --out names, cannot be written."""
    return ValueError(f"--out {path} cannot be written ({error.strerror or error}); choose another.")


def find_reason(error: BaseException) -> str:
    """The reason that the operating system or a store gave of the first failure behind `error`; else its own first line."""
    cause: BaseException | None = error
    while cause is not None:
        says_less = isinstance(cause, ValueError)  # as a WriteError, whose own cause has the reason
        if isinstance(cause, OSError) and (cause.strerror or not says_less):
            return cause.strerror or first_line(cause)
        cause = cause.__cause__ or cause.__context__
    return first_line(error)


def advise_space(reason: str) -> str:
    """What to do first where `reason` is a full disk, as the beginning of a clause; else ""."""
    return "free some space, then " if reason in map(os.strerror, (errno.ENOSPC, errno.EDQUOT)) else ""


def first_line(error: BaseException) -> str:
    """The first line of another library's error, for a sentence of ours."""
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def import_optional(module: str, need: str, extra: str) -> Any:
    """Import a module of an optional package.

    Args:
        need: what needs it, for the error ("video needs PyAV").
        extra: our extra that installs it.

    Raises:
        ValueError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{need}; install it with: pip install 'dino-vision[{extra}]'") from error
