"""What `dino COMMAND --help` prints, from the options themselves: the text under a class and under its fields, their types.

A class's text is a sentence, then lines of examples. Common options come first, the others under headings. The parser of
flags could print help too, but not in another order than that of the classes.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, get_args, get_origin

from dino.options import flatten
from dino.options.rules import Metavar, Options, allows_none, get_marks, get_plain, get_types

WIDEST, COLUMN = 100, 28  # characters of a line; where the text begins beside an option
_NUMBERS = (int, float)


class Flag(NamedTuple):
    """An option, or an argument that is given by its place."""

    name: str  # as in Python, e.g. "data.path"
    spellings: tuple[str, ...]  # as typed; of an argument by place the word that stands for it
    values: str  # words that stand for its values; "": a switch
    choices: tuple[str, ...]
    text: str
    default: Any  # dataclasses.MISSING: it must be given
    by_place: bool
    owner: type[Options]  # the class that declares it

    @property
    def is_needed(self) -> bool:
        return self.default is dataclasses.MISSING


@functools.cache
def _read_texts(module: str) -> dict[str, dict[str, str]]:
    """Class -> field -> the text under it in the source of a module, as one line."""
    texts: dict[str, dict[str, str]] = {}
    for kind in ast.parse(inspect.getsource(sys.modules[module])).body:
        for field, below in itertools.pairwise(kind.body if isinstance(kind, ast.ClassDef) else ()):
            match kind, field, below:
                case ast.ClassDef(), ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(
                    value=ast.Constant(value=str(text))
                ):
                    texts.setdefault(kind.name, {})[name] = " ".join(text.split())
    return texts


@functools.cache
def list_flags(kind: type[Options]) -> tuple[Flag, ...]:
    """Arguments in their order, then every option, also of sections: those of the class itself, then those of its bases."""
    flags: list[Flag] = []
    types, texts = get_types(kind), dict[str, str]()
    for base in reversed([base for base in kind.__mro__ if issubclass(base, Options)]):
        texts |= _read_texts(base.__module__).get(base.__name__, {})
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    owners = {name: base for base in reversed(kind.__mro__) for name in vars(base).get("__annotations__", ())}
    rank = {base: i for i, base in enumerate(kind.__mro__)}
    for name in sorted(types, key=lambda name: -1 if _is_by_place(types[name]) else rank[owners[name]]):
        hint, plain, marks = types[name], get_plain(types[name]), get_marks(types[name])
        if "Suppress" in map(repr, marks):
            continue
        if isinstance(plain, type) and issubclass(plain, Options):
            flags += list_flags(plain)
            continue
        by_place, values, full = _is_by_place(hint), _name_values(hint), kind.section + name
        dashed = "--" + full.replace("_", "-")
        spellings = [alias for mark in marks for alias in getattr(mark, "aliases", None) or ()] + [dashed]
        if by_place:
            spellings = [name.upper() + "..." * (get_origin(plain) is tuple)]
        elif defaults[name] is True:
            spellings.append(f"--{kind.section}no-{name}".replace("_", "-"))
        text, owner = texts.get(name, ""), kind if kind.section else owners[name]
        flags.append(Flag(full, tuple(spellings), values, _find_choices(plain), text, defaults[name], by_place, owner))
    return tuple(flags)


def _is_by_place(hint: Any) -> bool:
    return "Positional" in map(repr, get_marks(hint))


def _find_choices(plain: Any) -> tuple[str, ...]:
    if get_origin(plain) is tuple:
        return _find_choices(get_plain(get_args(plain)[0]))
    return tuple(map(str, get_args(plain))) if get_origin(plain) is Literal else ()


def _name_values(hint: Any) -> str:
    """Words that stand for an option's values: NUMBER, TEXT, FOLDER, or the choices."""
    plain = get_plain(hint)
    if plain is bool:
        return "[True|False]" if allows_none(hint) else ""
    several = get_origin(plain) is tuple
    words = []
    for part in (part for part in get_args(plain) if part is not ...) if several else [hint]:
        mark = next((mark for mark in get_marks(part) if isinstance(mark, Metavar)), None)
        usual = "NUMBER" if get_plain(part) in _NUMBERS else "TEXT"
        words.append(mark or "|".join(_find_choices(get_plain(part))) or usual)
    return f"{words[0]} ..." if several and ... in get_args(plain) else " ".join(words)


# --- the page ------------------------------------------------------------------------------------------------------


def get_width() -> int:
    return max(40, min(WIDEST, shutil.get_terminal_size().columns))


def fill(text: str, indent: str = "", first: str | None = None) -> str:
    """A paragraph as lines of the terminal's width; long words are broken, and nothing is lost."""
    first = indent if first is None else first
    # A break at a hyphen would cut the name of an option.
    return textwrap.fill(text, get_width(), initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)


def draw_rows(rows: Iterable[tuple[str, str]], column: int = COLUMN) -> str:
    """Each word and its text beside it; below it where the word is too long."""
    lines, column = [], min(column, get_width() // 2)
    for word, text in rows:
        start = f"  {word}".ljust(column)
        if len(word) > column - 4:
            lines.append(fill(word, " " * 6, "  "))
            start = " " * column
        if text or start.strip():
            lines.append(fill(text, " " * column, start) if text else start.rstrip())
    return "\n".join(lines)


def describe(kind: type[Options], prog: str, values: Options | None = None) -> str:
    """The help of a command.

    Args:
        prog: begins its usage.
        values: shown where they differ from the defaults: of a recipe, for example.
    """
    flags, shown = list_flags(kind), {} if values is None else flatten(values)
    by_place = [flag for flag in flags if flag.by_place]
    usage = [prog, *(flag.spellings[0] if flag.is_needed else f"[{flag.spellings[0]}]" for flag in by_place)]
    usage += [f"{flag.spellings[0]} {flag.values}" for flag in flags if flag.is_needed and not flag.by_place]
    parts = [*_draw_text(inspect.getdoc(kind) or ""), fill(" ".join([*usage, "[OPTIONS]"]), " " * 7, "usage: ")]
    for title, group in _group(kind, flags).items():
        parts.append(fill(title) + "\n" + draw_rows(_draw_row(flag, shown.get(flag.name)) for flag in group))
    parts.append(fill("--debug shows where in the code an error comes from. `dino help` lists all commands."))
    return "\n\n".join(parts)


def _group(kind: type[Options], flags: Iterable[Flag]) -> dict[str, list[Flag]]:
    """Headings and what stands under each: arguments by place, common options, the others, and those of the sections."""
    arguments, common, others = "arguments:", "common options:", "more options:"
    groups: dict[str, list[Flag]] = {arguments: [], common: [], others: []}
    for flag in flags:
        section = flag.owner.section
        about = vars(flag.owner).get("__doc__") or ""
        is_common = flag.is_needed or (flag.name in kind.common if kind.common else flag.owner is kind)
        title = f"options {section}*: {about}" if section else others
        groups.setdefault(arguments if flag.by_place else common if is_common else title, []).append(flag)
    order = {name: i for i, name in enumerate(kind.common)}
    groups[common].sort(key=lambda flag: (not flag.is_needed, order.get(flag.name, 0)))
    return {title: group for title, group in groups.items() if group}


def _draw_text(doc: str) -> Iterator[str]:
    for paragraph in doc.split("\n\n"):
        is_example = paragraph.lstrip().startswith("dino ")
        yield textwrap.indent(textwrap.dedent(paragraph), "  ") if is_example else fill(" ".join(paragraph.split()))


def _draw_row(flag: Flag, value: Any) -> tuple[str, str]:
    word = ", ".join(flag.spellings) + f" {flag.values}" * bool(flag.values and not flag.by_place)
    text = re.sub(r"\bNone: ", "Default: ", flag.text)
    if flag.by_place and flag.choices:
        text += f" Choose {', '.join(flag.choices)}."
    if flag.is_needed and not flag.by_place:
        text += " Needed."
    elif not (flag.is_needed or isinstance(flag.default, bool) or flag.default in (None, "", ())):
        text += f" Default: {_write(flag.default)}."
    if value not in (None, flag.default):
        text += f" Here: {_write(value)}."
    return word, text


def _write(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_write, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
