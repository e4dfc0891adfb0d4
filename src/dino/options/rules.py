"""The one check of all options: each value is of its field's type, one of its choices, and meets the rules in its type.

A rule stands in an ``Annotated`` type. Types that several options share have a name here, for example `PositiveInt`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from numbers import Integral, Real
from types import NoneType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    ParamSpec,
    TypeVar,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from dino.errors import did_you_mean


class Rule(NamedTuple):
    """What a value of the right type must meet, and how to say so."""

    accepts: Callable[[Any], object]
    text: str

    def __repr__(self) -> str:  # the parser of flags shows types in its errors
        return self.text


class Metavar(str):
    """The word that stands for a value in help, in the type of a field: ``Annotated[str, Metavar("FOLDER")]``."""


def at_least(least: float, text: str) -> Rule:
    return Rule(lambda value: value >= least, text)


def matching(pattern: str, text: str) -> Rule:
    """All of a text must match a regular expression."""
    return Rule(re.compile(pattern).fullmatch, text)


def between(least: float, most: float, unit: str = "") -> Rule:
    """Above `most` nothing is meant, but the memory or the time of the machine would be gone before it shows."""
    return Rule(lambda value: least <= value <= most, f"it must lie between {least:,} and {most:,}{unit}")


def parse_bytes(size: str) -> int:
    """Bytes of "8GB", "500 MB" or "7.5GiB"; 0 if it is none of these."""
    match = re.fullmatch(r"([0-9]{0,9}\.?[0-9]{1,9})\s*([MG])(i?)B", size.strip(), re.IGNORECASE)
    if match is None:
        return 0
    return int(float(match[1]) * (1024 if match[3] else 1000) ** {"M": 2, "G": 3}[match[2].upper()])


def parse_part(text: str) -> tuple[int, int] | None:
    """(2, 8) of "2/8", the second of eight parts; None if it is none."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text.strip())
    part = match and (int(match[1]), int(match[2]))
    return part if part and 1 <= part[0] <= part[1] else None


NOT_EMPTY = Rule(len, "give at least one value")
_NOT_NEGATIVE, _ONE = at_least(0, "it cannot be negative"), at_least(1, "it must be at least 1")
_MOST = 10**9

PositiveInt = Annotated[int, _ONE, between(1, _MOST)]
NonNegativeInt = Annotated[int, _NOT_NEGATIVE, between(0, _MOST)]
Device = Literal["auto", "cpu", "cuda", "mps"]
Pixels = Annotated[int, _ONE, between(1, 4096, " pixels")]  # edge of a view, an image or a patch
Width = Annotated[int, _ONE, between(1, 2**16, " numbers")]  # of a layer
Few = Annotated[int, _ONE, between(1, 1000)]  # blocks, heads, jobs
NoneOrFew = Annotated[int, _NOT_NEGATIVE, between(0, 1000)]  # layers, views, processes
Seed = Annotated[int, Rule(lambda value: 0 <= value < 2**32, "a seed lies in [0, 2**32)")]
PositiveFloat = Annotated[float, Rule(lambda value: value > 0, "it must be above 0 and finite"), between(1e-9, _MOST)]
NonNegativeFloat = Annotated[float, _NOT_NEGATIVE, between(0, _MOST)]
Rate = Annotated[float, _NOT_NEGATIVE]  # a run that one too large makes diverge ends by itself
Temperature = Annotated[float, Rule(lambda value: value > 0, "it must be above 0 and finite"), between(0.001, 1000)]
Share = Annotated[float, Rule(lambda value: 0 <= value <= 1, "a probability or share lies between 0 and 1")]
BelowOne = Annotated[float, Rule(lambda value: 0 <= value < 1, "it must be in [0, 1)")]
AttentionMass = Annotated[
    float, Rule(lambda value: 0 < value <= 1, "the share of attention to keep lies above 0 and up to 1")
]
ModelName = Annotated[str, Metavar("MODEL")]  # what `dino.load` takes
RunName = Annotated[str, Metavar("RUN")]
Embedding = Annotated[str, Metavar("EMBEDDING")]  # what `dino embed` writes
DataSpec = Annotated[str, Metavar("IMAGES")]  # what `dino.data.specs` describes
Folder = Annotated[str, Metavar("FOLDER")]
File = Annotated[str, Metavar("FILE")]
Name = Annotated[str, Metavar("NAME")]
MemorySize = Annotated[str, Metavar("SIZE"), Rule(parse_bytes, "write an amount of memory such as 8GB or 500MB")]
Part = Annotated[
    str,
    Metavar("I/N"),
    Rule(parse_part, "write i/n, the i-th of n parts: from 1/8 to 8/8 where there are eight (in a job array, 1-8)"),
]

# Type -> the values that are taken for it and converted, and its name in an error.
_PLAIN: dict[Any, tuple[Any, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    bool: (bool, "True or False"),
    str: ((str, os.PathLike), "text"),
}


_short = reprlib.Repr()  # a value of any size and depth, for a sentence
_short.maxstring = _short.maxother = _short.maxlong = 100


def conform(value: Any, kind: Any) -> Any:
    """`value` as type `kind` holds it: an integer becomes a float where one is meant, a list or a single value a tuple,
    a path text.

    Raises:
        ValueError: wrong type, no choice, or against a rule; the rest of a sentence that begins with "NAME is".
    """
    origin, parts, shown = get_origin(kind), get_args(kind), _short.repr(value)
    if origin is Annotated:
        value = conform(value, parts[0])
        for rule in parts[1:]:
            if isinstance(rule, Rule) and not rule.accepts(value):
                given = value if isinstance(value, str) and len(value) < 100 else _short.repr(value)
                raise ValueError(f"{given}; {rule.text}.")
        return value
    if allows_none(kind):
        return None if value is None else conform(value, parts[0])
    if origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in parts):
            choices = [str(choice) for choice in parts]
            near = did_you_mean(value, choices) if isinstance(value, str) else ""
            raise ValueError(f"{shown}; choose one of {', '.join(choices)}.{near}")
        return value
    if origin is tuple:
        any_length = parts[-1] is ...
        if any_length and isinstance(value, str | int | float):
            value = (value,)
        if not isinstance(value, tuple | list) or not (any_length or len(value) == len(parts)):
            raise ValueError(f"{shown}; give {'a list of' if any_length else len(parts)} values.")
        return tuple(conform(one, parts[0] if any_length else parts[i]) for i, one in enumerate(value))
    if kind not in _PLAIN:  # a section, which has checked itself
        if not isinstance(value, kind):
            raise ValueError(f"{shown}; it must be {kind.__name__}.")
        return value
    taken, name = _PLAIN[kind]
    if not isinstance(value, taken) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{shown}; it must be {name}.")
    try:
        value = kind(value)
    except OverflowError:  # of an integer beyond all floats
        value = math.inf
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{shown}; it must be a finite number.")
    if kind is str and "\0" in value:
        raise ValueError(f"{shown}; no name holds a zero byte.")
    return value


def allows_none(kind: Any) -> bool:
    """Whether a type is an Optional, whose other type is the first."""
    return allows_none(get_args(kind)[0]) if get_origin(kind) is Annotated else NoneType in get_args(kind)


def get_plain(kind: Any) -> Any:
    """A type without its rules and None."""
    while get_origin(kind) is Annotated or allows_none(kind):
        kind = get_args(kind)[0]
    return kind


def get_marks(kind: Any) -> list[Any]:
    """What ``Annotated`` says of a type and of its parts."""
    return [*getattr(kind, "__metadata__", ()), *(mark for part in get_args(kind) for mark in get_marks(part))]


def conform_named(name: str, value: Any, kind: Any) -> Any:
    """`conform`, with an error that is a whole sentence: it begins with the name."""
    try:
        return conform(value, kind)
    except ValueError as error:
        raise ValueError(f"{name} is {error}") from None


@functools.cache
def get_types(kind: type[Options]) -> dict[str, Any]:
    """Field -> type with its rules, in the order of declaration."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


CHECKED = ContextVar("CHECKED", default=True)  # False while a parser builds options; it checks them at the end


@dataclass_transform(frozen_default=True, kw_only_default=True)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Base of all options. A subclass becomes a frozen dataclass of keywords, checked whenever one is made.

    `section` is what the names of its fields begin with: ``class OptimOptions(Options, section="optim.")``; `common` names
    the options that help shows first. The text under a class is the beginning of its command's help, with two examples.
    """

    section: ClassVar[str] = ""
    common: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, section: str = "", common: tuple[str, ...] = ()) -> None:
        cls.section, cls.common = section, common or cls.common
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        if CHECKED.get():
            self.check()

    def check(self) -> None:
        """Hold all values to their types and rules, converting those that `conform` converts.

        Raises:
            ValueError: names the option with its section, the value, and the rule, type or choices.
        """
        for name, kind in get_types(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, Options):
                value.check()
            object.__setattr__(self, name, conform_named(f"{self.section}{name}", value, kind))
        for message in self.contradictions():
            raise ValueError(message)

    def contradictions(self) -> Iterator[str]:
        """Values that exclude each other, each in a sentence."""
        yield from ()


_NAMES = (str, bytes, os.PathLike, Real, tuple, list, dict, NoneType)  # what is no model, data or embedding itself
P = ParamSpec("P")
R = TypeVar("R")


def checked(kind: type[Options], *names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Hold the arguments `names` of a function to the rules of the options of these names in `kind`.

    A model, data or an embedding in place of its name passes as it is.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature, types = inspect.signature(function), get_types(kind)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs)
            for name in given.arguments.keys() & set(names):
                value = given.arguments[name]
                if name in ("model", "data", "embedding") and not isinstance(value, _NAMES):
                    continue
                given.arguments[name] = conform_named(name, value, types[name])
            return function(*given.args, **given.kwargs)

        return call

    return decorate
