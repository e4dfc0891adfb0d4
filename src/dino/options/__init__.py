"""Everything that a user can set, at the bottom of the house: nothing heavy is imported here."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

from dino.errors import did_you_mean
from dino.options.rules import Options

T = TypeVar("T")
AnyOptions = TypeVar("AnyOptions", bound=Options)


def required(value: T | None) -> T:
    """An option that `dino.options.auto.resolve` has filled in."""
    assert value is not None
    return value


def flatten_names(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}, in the same order."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= flatten_names(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def flatten(options: Options) -> dict[str, Any]:
    """Options as {dotted name: value}, in declaration order."""
    return flatten_names(dataclasses.asdict(options))


def find_names(word: str, known: Iterable[str]) -> list[str]:
    """The dotted names that end in `word`: "lr" is that of "optim.lr"."""
    return [name for name in known if name.rpartition(".")[2] == word]


SHORT = {"data": "data.path", "model": "model.arch"}  # as the command line has --data and --model


def complete_names(changes: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The same by dotted names, of which the last part is enough where only one option has it: "lr" is "optim.lr".

    Raises:
        ValueError: several have it, or an option is given twice.
    """
    complete: dict[str, Any] = {}
    for word, value in changes.items():
        found = [word] if word in known else [SHORT[word]] if word in SHORT else find_names(word, known)
        if len(found) > 1:
            raise ValueError(f"'{word}' may be {' or '.join(found)}; write **{{'{found[0]}': ...}}.")
        name = found[0] if found else word
        if name in complete:
            raise ValueError(f"{name} is given twice; leave one of them out.")
        complete[name] = value
    return complete


def replace(options: AnyOptions, changes: dict[str, Any]) -> AnyOptions:
    """A copy of `options` with dotted names replaced, e.g. ``{"head.out_dim": 256}``.

    Raises:
        ValueError: there are no such options, or they do not take these values.
    """
    known = flatten(options)
    if unknown := sorted(changes.keys() - known.keys()):
        near = did_you_mean(unknown[0], known)
        raise ValueError(f"unknown options {unknown}; `dino train --help` lists them.{near}")
    own: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, _, leaf = name.rpartition(".")
        (nested.setdefault(section, {}) if section else own)[leaf] = value
    own |= {name: dataclasses.replace(getattr(options, name), **values) for name, values in nested.items()}
    return dataclasses.replace(options, **own)
