"""Options from the flags of a command line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from dino.errors import did_you_mean
from dino.options import AnyOptions, flatten
from dino.options.rules import CHECKED, allows_none, get_plain, get_types

_REGISTRY = ConstructorRegistry()


@_REGISTRY.primitive_rule
def _read_words(field: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """How the parser reads an option. A word that is no such value stays a word, which the check of the options refuses.

    So the sentence is ours, and the same as for a value from Python or from a file.
    """
    kind = get_plain(field.type)
    if kind is bool and allows_none(field.type):  # the flag alone means True
        words_of = {"True": True, "False": False, "None": None}
        return PrimitiveConstructorSpec(
            nargs="*",
            metavar="[True|False]",
            instance_from_str=lambda words: words_of.get(words[0], words[0]) if words else True,
            is_instance=lambda _: True,
            str_from_instance=lambda value: [str(value)],
        )
    several = get_origin(kind) is tuple
    parts = [get_plain(part) for part in get_args(kind) if part is not ...] if several else [kind]
    if parts[0] not in (int, float, str) and get_origin(parts[0]) is not Literal:
        return None  # a flag without a value, or a section

    def read(word: str) -> Any:
        if word == "None" and allows_none(field.type):
            return None
        try:
            choices = get_args(parts[0])
            return {str(choice): choice for choice in choices}.get(word, word) if choices else parts[0](word)
        except ValueError:
            return word

    names = [
        "{" + ",".join(map(str, get_args(part))) + "}" if get_args(part) else part.__name__.upper() for part in parts
    ]
    return PrimitiveConstructorSpec(
        nargs="*" if several else 1,
        metavar=f"[{names[0]} ...]" if several and ... in get_args(kind) else " ".join(names),
        instance_from_str=lambda words: tuple(map(read, words)) if several and words != ["None"] else read(words[0]),
        is_instance=lambda _: True,
        str_from_instance=lambda value: [*map(str, value)] if isinstance(value, tuple) else [str(value)],
    )


def parse_flags(
    kind: type[AnyOptions], arguments: Sequence[str], prog: str, default: AnyOptions | None = None
) -> AnyOptions:
    """The options that `arguments` give; the others as in `default`. `prog` begins the usage line.

    Raises:
        SystemExit: help was asked for and given.
        ValueError: an option does not exist, is missing, has no value, or breaks its rule.
    """
    needed = [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]
    token, said = CHECKED.set(False), io.StringIO()
    try:
        if default is None and not {"-h", "--help"} & {*arguments}:
            default = kind(**dict.fromkeys(needed))
        given: dict[str, Any] = {} if default is None else {"default": default}
        with (
            _REGISTRY,
            contextlib.redirect_stderr(said),
            warnings.catch_warnings(action="ignore"),  # None stands for what must be given
        ):
            options, unknown = tyro.cli(kind, args=arguments, prog=prog, return_unknown_args=True, **given)
    except SystemExit as stop:
        if not stop.code:
            raise
        name = re.search(r"'(-[^']*)'", said.getvalue())
        flag = name[1] if name else "an option"
        raise ValueError(f"{flag} has no value; write it as {flag}=VALUE where it begins with '-'.") from None
    finally:
        CHECKED.reset(token)
    if unknown:
        flag = unknown[0].partition("=")[0][:99]
        if _is_positional(kind, flag.removeprefix("--")):
            raise ValueError(f"{flag[2:]} is given by its place and not as '{flag}'; --help shows the order.")
        near = did_you_mean(flag, [f"--{name.replace('_', '-')}" for name in flatten(options)])
        raise ValueError(f"there is no option '{flag}'; --help lists them.{near}")
    if missing := [name for name in needed if getattr(options, name) is None]:
        dashes = "" if _is_positional(kind, missing[0]) else "--"
        raise ValueError(f"{dashes}{missing[0]} is missing; --help explains it.")
    options.check()
    return options


def _is_positional(kind: type, name: str) -> bool:
    return "Positional" in repr(get_types(kind).get(name))
