"""What the values of options must meet: a `Rule` in a field's ``Annotated`` type, checked for all fields at once."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints


class Rule(NamedTuple):
    """What an option's value must meet, or each of several; one that is left open (None) meets all."""

    meets: Callable[[Any], bool]
    text: str


def at_least(least: int, text: str) -> Rule:
    return Rule(lambda value: value >= least, text)


def parse_bytes(size: str) -> int:
    """Bytes of "8GB", "500 MB" or "7.5GiB"; 0 if it is none of these."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([MG])(i?)B", size.strip(), re.IGNORECASE)
    if match is None:
        return 0
    return int(float(match[1]) * (1024 if match[3] else 1000) ** {"M": 2, "G": 3}[match[2].upper()])


COUNT = at_least(1, "it must be at least 1")
NOT_NEGATIVE = at_least(0, "it cannot be negative")
POSITIVE = Rule(lambda value: 0 < value < math.inf, "it must be above 0 and finite")
SHARE = Rule(lambda value: 0 <= value <= 1, "a probability or share lies between 0 and 1")
BELOW_ONE = Rule(lambda value: 0 <= value < 1, "it must be in [0, 1)")
AREA = Rule(lambda value: 0 < value <= 1, "a share of the image area lies above 0 and is at most 1")
TURN = Rule(lambda value: 0 <= value <= 0.5, "a hue shift lies in [0, 0.5] turns")
MEMORY = Rule(lambda value: parse_bytes(value) > 0, "write an amount of memory such as 8GB or 500MB")
SEED = Rule(lambda value: 0 <= value < 2**32, "a seed lies in [0, 2**32)")


@functools.cache
def _rules(kind: type) -> dict[str, list[Rule]]:
    hints = get_type_hints(kind, include_extras=True)
    return {name: [r for r in getattr(hint, "__metadata__", ()) if isinstance(r, Rule)] for name, hint in hints.items()}


def check(options: Any, prefix: str = "") -> None:
    """The rules of all fields of a dataclass, and of those that are fields of it.

    Raises:
        ValueError: one is broken; names the field with its dotted name, the value and the rule.
    """
    for name, rules in _rules(type(options)).items():
        value = getattr(options, name)
        if dataclasses.is_dataclass(value):
            check(value, f"{prefix}{name}.")
        for one in value if isinstance(value, tuple) else (value,):
            for rule in rules:
                if one is not None and not rule.meets(one):
                    raise ValueError(f"{prefix}{name} is {one}; {rule.text}.")
