"""What a shell offers at Tab: commands, options, choices and recipes. Where there is none of these it offers files itself.

The scripts ask `dino __complete WORDS`, so they need not be written anew after an update.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from dino.options.commands import RecipesOptions
from dino.options.help import list_flags
from dino.options.recipes import RECIPES
from dino.options.rules import Options
from dino.options.train import TrainOptions
from dino.options.trainings import SubmitOptions

_BASH = """\
_dino() { local IFS=$'\\n'; COMPREPLY=($(dino __complete "${COMP_WORDS[@]:1:$COMP_CWORD}" 2>/dev/null)); }
complete -o default -F _dino dino
"""
SCRIPTS = {
    "bash": _BASH,
    "zsh": "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n" + _BASH,
    "fish": "complete -c dino -a '(dino __complete (commandline -opc)[2..] (commandline -ct) 2>/dev/null)'\n",
}


def complete(words: Sequence[str], commands: Mapping[str, type[Options]]) -> list[str]:
    """What the last of `words`, which may be empty, can become; the others are what stands before it."""
    before, current = [word for word in words[:-1] if word not in ("=", "help")], "".join(words[-1:]).lstrip("=")
    name = next((name for name in (" ".join(before[:2]), *before[:1]) if name in commands), "")
    found: Iterable[str] = []
    if not name:
        known = [(command.split(), len(before)) for command in commands]
        found = {parts[place] for parts, place in known if parts[:place] == before and len(parts) > place}
        found |= {"help"} if not before else set()
    else:
        found = _complete_option(commands[name], before, current)
    return sorted(word for word in found if word.startswith(current))


def _complete_option(kind: type[Options], before: Sequence[str], current: str) -> Iterable[str]:
    if kind is SubmitOptions and "train" in before:
        kind = TrainOptions
    flags = list_flags(kind)
    if asked := next((flag for flag in flags if before[-1] in flag.spellings and flag.values), None):
        return asked.choices
    if current.startswith("-"):
        return ["--help", "--debug", *(word for flag in flags if not flag.by_place for word in flag.spellings)]
    has_recipe = issubclass(kind, TrainOptions) and before[-1] in ("train", "bench", "plan")
    if kind is SubmitOptions:
        return ["train"]
    if has_recipe or kind is RecipesOptions:
        return RECIPES
    return [choice for flag in flags if flag.by_place for choice in flag.choices]
