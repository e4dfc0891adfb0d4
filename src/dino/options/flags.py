"""Options from the flags of a command line."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from dino import errors
from dino.options import AnyOptions, find_names
from dino.options.help import Flag, describe, list_flags
from dino.options.rules import CHECKED, Options, allows_none, get_plain
from dino.options.train import TrainOptions

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
            metavar="",  # our own help names values
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

    return PrimitiveConstructorSpec(
        nargs="*" if several else 1,
        metavar="",
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
    if {"-h", "--help"} & {*arguments}:
        print(describe(kind, prog, default))
        raise SystemExit(0)
    flags = list_flags(kind)
    needed = [flag for flag in flags if flag.is_needed]
    token, said = CHECKED.set(False), io.StringIO()
    try:
        default = default or kind(**dict.fromkeys([flag.name for flag in needed]))
        with (
            _REGISTRY,
            contextlib.redirect_stderr(said),
            warnings.catch_warnings(action="ignore"),  # None stands for what must be given
        ):
            options, unknown = tyro.cli(kind, args=arguments, default=default, add_help=False, return_unknown_args=True)
    except SystemExit:
        name = re.search(r"'(-[^']*)'", said.getvalue())
        flag = name[1].partition("/")[0] if name else "an option"
        raise ValueError(f"{flag} needs a value behind it; if that begins with '-', write {flag}=VALUE.") from None
    finally:
        CHECKED.reset(token)
    if unknown:
        raise ValueError(_explain_unknown(unknown[0].partition("=")[0][:99], kind, flags))
    if missing := [flag.spellings[0] for flag in needed if getattr(options, flag.name) is None]:
        raise ValueError(f"{missing[0]} is missing; --help explains it.")
    options.check()
    return options


def _explain_unknown(word: str, kind: type[Options], flags: Sequence[Flag]) -> str:
    """What to do instead of `word`, which the parser does not know."""
    name = word.lstrip("-").replace("-", "_")
    if word.lower() in ("true", "false", "yes", "no", "on", "off"):
        return f"a switch takes no '{word}'; write its name alone, and --no-NAME for off."
    if not word.startswith("-"):
        return (
            f"'{word}' is one word too many; put a name with spaces in quotes, and in place of a pattern such as *.jpg, "
            "which the shell writes out, give the folder or a list of files (.txt)."
        )
    if name in [flag.name for flag in flags if flag.by_place]:
        return f"{word[2:]} is given by its place and not as '{word}'; --help shows the order."
    if name in ("gpu", "gpus") and issubclass(kind, TrainOptions):
        return (
            f"there is no option '{word}': a training takes one GPU, which CUDA_VISIBLE_DEVICES=0 chooses; for several "
            "start it with torchrun --nproc-per-node 2 -m dino train ..., or on a cluster with dino submit --gpus 2 train ..."
        )
    names, name = [flag.name for flag in flags], errors.SYNONYMS.get(name, name)
    near = find_names(name, names) or get_close_matches(name, names, 1)
    hint = " or ".join(f"'--{each}'".replace("_", "-") for each in near)
    return f"there is no option '{word}'; --help lists them." + (f" Did you mean {hint}?" if near else "")
