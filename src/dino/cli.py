"""The command line: one table from a command to its options and the function that does it.

Parsing comes first and importing after, so `dino --help` neither loads PyTorch nor takes half a second.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from dino import errors
from dino.options import commands as looks
from dino.options import recipes, toml
from dino.options.commands import (
    AblateOptions,
    BenchOptions,
    ExportOptions,
    ModelsOptions,
    RecipesOptions,
    ReportOptions,
)
from dino.options.evaluate import EVALUATIONS
from dino.options.recipes import find_recipe
from dino.options.train import TrainOptions
from dino.run import check_resumable
from dino.version import __version__


class Command(NamedTuple):
    summary: str
    options: type
    function: str  # "module:function", called with the options' fields


COMMANDS: dict[str, Command] = {
    "train": Command("learn from images without labels", TrainOptions, "dino.run:run"),
    **{f"eval {name}": Command(what, kind, "dino.eval.evaluate:command") for name, (what, kind) in EVALUATIONS.items()},
    "ablate": Command("train the rows of one of the paper's tables", AblateOptions, "dino.ablate:ablate_command"),
    "bench": Command("what training costs on your data and machine, and what helps", BenchOptions, "dino.bench:bench"),
    "attention": Command("pictures of where the model looks", looks.AttentionOptions, "dino.look.commands:attention"),
    "pca": Command("features of patches as colors", looks.PcaOptions, "dino.look.commands:pca"),
    "match": Command("corresponding patches of two images", looks.MatchOptions, "dino.look.commands:match"),
    "video": Command("attention, masks or colors over a clip", looks.VideoOptions, "dino.look.commands:video"),
    "embed": Command("features of a folder as Parquet", looks.EmbedOptions, "dino.features.commands:embed"),
    "search": Command("images most like yours", looks.SearchOptions, "dino.features.commands:search"),
    "duplicates": Command("near-copies, as groups", looks.DuplicatesOptions, "dino.features.commands:duplicates"),
    "outliers": Command("images unlike all others", looks.OutliersOptions, "dino.features.commands:outliers"),
    "figure tsne": Command("a map of classes (t-SNE)", looks.TsneOptions, "dino.look.figures:draw_tsne"),
    "figure neighbors": Command(
        "where k-NN is right and wrong", looks.NeighborsOptions, "dino.look.figures:draw_neighbor_page"
    ),
    "app": Command("a page to explore what a model sees", looks.AppOptions, "dino.app:command"),
    "report": Command("write a run's report.html again", ReportOptions, "dino.run:report_command"),
    "models": Command("list or download the released weights", ModelsOptions, "dino.weights.releases:models_command"),
    "export": Command(
        "write a model for other libraries and runtimes", ExportOptions, "dino.exports.export:export_command"
    ),
    "convert": Command("another name of export", ExportOptions, "dino.exports.export:export_command"),
    "recipes": Command("list the named configurations", RecipesOptions, "dino.cli:show_recipes"),
}

HELP = """\
usage: dino COMMAND [OPTIONS]

Self-supervised pre-training of vision models with DINO (Caron et al. 2021).

{commands}

first steps:
  dino train                                     train on built-in drawn scenes: minutes on a laptop
  dino train --data photos/ --out runs/a         train on your own images, any folder, no labels needed
  dino train vit_small_100ep --data train/       a named recipe (see: dino recipes), any option can follow
  dino train mine.toml --epochs 30               a file is flags written down; flags win
  dino train --resume runs/a                     continue an interrupted run, to the bit
  dino app runs/a                                explore it in a browser: where it looks, what is alike

dino COMMAND --help explains every option. --debug after any command shows the full traceback of an error.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 when the work failed, 2 for misuse, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _complain("interrupted.", 130)
    except BrokenPipeError:  # whoever read our output has seen enough; Python would complain again when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            raise
        name = type(error).__name__
        if isinstance(error, ValueError):
            # What is wrong for one rank is wrong for all of them: said once.
            return _complain(str(error), 2) if os.environ.get("RANK", "0") == "0" else 2
        if name in ("TrainingError", "CheckpointError", "DownloadError"):
            return _complain(str(error), 1)
        return _complain(f"{name}: {error} (add --debug to see where)", 1)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        print(HELP.format(commands="\n".join(f"  {n:<{width}}  {c.summary}" for n, c in COMMANDS.items())), end="")
        return 0
    if arguments[0] == "--version":
        print(f"dino {__version__}")
        return 0
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name, rest = " ".join(arguments[:words]), arguments[words:]
    if name not in COMMANDS:
        known = sorted(n for n in COMMANDS if n.startswith(f"{name} ")) or list(COMMANDS)
        near = errors.did_you_mean(" ".join(arguments[:2]), known) or errors.did_you_mean(name, known)
        raise ValueError(f"there is no command '{name}'; known are {', '.join(known)}.{near}")
    command = COMMANDS[name]
    if issubclass(command.options, TrainOptions):
        options = _parse_train(rest, command.options, name)
    else:
        options = tyro.cli(command.options, args=rest, prog=f"dino {name}")
    module, _, function = command.function.partition(":")
    code = getattr(importlib.import_module(module), function)(options)
    return code if isinstance(code, int) else 0


def _parse_train(arguments: list[str], kind: type[TrainOptions] = TrainOptions, name: str = "train") -> TrainOptions:
    """`dino train [RECIPE | FILE.toml] [FLAGS]`: flags win over the file or recipe they follow; as `dino bench`."""
    default, flags = TrainOptions(), []
    if arguments and not arguments[0].startswith("-"):
        first, arguments = arguments[0], arguments[1:]
        if first.endswith(".toml"):
            flags = toml.read_flags(Path(first))
        elif first not in recipes.RECIPES and Path(first).exists():
            raise ValueError(f"'{first}' is not a recipe; to train on it write: dino {name} --data {first}")
        else:
            default = find_recipe(first).options
    elif not any(a.split("=")[0] in ("--data", "--data.path", "--resume", "-h", "--help") for a in arguments):
        default = find_recipe("demo").options
    resuming = argparse.ArgumentParser(add_help=False, allow_abbrev=False, prog=f"dino {name}")
    resuming.add_argument("--resume")
    if (resume := resuming.parse_known_args(arguments)[0].resume) is not None:
        default, flags = toml.read_recorded(resume), []
    default = kind(**{f.name: getattr(default, f.name) for f in fields(default)})
    options = tyro.cli(kind, args=flags + arguments, default=default, prog=f"dino {name} [RECIPE | FILE.toml]")
    if resume is not None and name == "train":
        check_resumable(default, options)
    return options


def show_recipes(options: RecipesOptions) -> None:
    if options.name:
        import tomli_w

        print(tomli_w.dumps(toml.to_dict(find_recipe(options.name).options)), end="")
        return
    for name, recipe in recipes.RECIPES.items():
        print(f"{name}\n    {recipe.about}\n    {recipe.command}\n    expected: {recipe.expected}")


def _complain(text: str, code: int) -> int:
    print(f"dino: {text}", file=sys.stderr)
    return code


def run() -> Any:
    sys.exit(main())
