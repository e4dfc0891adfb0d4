"""The command line: one table from a command to its options and the function that does it.

Arguments are parsed before the function is imported, so that help and mistakes need no PyTorch and answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import io
import itertools
import os
import re
import shlex
import sys
from collections.abc import Iterable
from typing import NamedTuple

from dino import errors, names
from dino.options import commands, completion, flatten, help, toml, trainings
from dino.options.evaluate import EVALUATIONS, AllOptions
from dino.options.flags import parse_flags
from dino.options.recipes import RECIPES, choose_base, find_recipe, free_length
from dino.options.rules import Options
from dino.options.train import TrainOptions
from dino.version import __version__


class Command(NamedTuple):
    summary: str
    options: type[Options]
    function: str  # "module:function", called with the options


COMMANDS: dict[str, Command] = {
    "train": Command("learn from images without labels", TrainOptions, "run:run_training"),
    "submit": Command("train on a Slurm cluster", trainings.SubmitOptions, "slurm:submit_command"),
    **{
        f"eval {name}": Command(what, kind, "eval.evaluate:evaluate_command")
        for name, (what, kind) in EVALUATIONS.items()
    },
    "eval all": Command("every evaluation that your data allow, one table", AllOptions, "eval.everything:evaluate_all"),
    "ablate": Command("train the rows of one of the paper's tables", trainings.AblateOptions, "ablate:ablate_command"),
    "bench": Command(
        "what training costs on your data and machine, and what helps", trainings.BenchOptions, "bench:bench"
    ),
    "plan": Command(
        "what a training would be: model, time, memory, and what to consider", trainings.PlanOptions, "plan:plan"
    ),
    "doctor": Command("what is wrong with this machine, images or a run", commands.DoctorOptions, "doctor:doctor"),
    "attention": Command(
        "pictures of where the model looks", commands.AttentionOptions, "look.commands:draw_attention"
    ),
    "pca": Command("features of patches as colors", commands.PcaOptions, "look.commands:draw_pca"),
    "match": Command("corresponding patches of two images", commands.MatchOptions, "look.commands:draw_matches"),
    "video": Command("attention, masks or colors over a clip", commands.VideoOptions, "look.commands:draw_video"),
    "embed": Command("features of a folder as Parquet", commands.EmbedOptions, "features.commands:write_embedding"),
    "search": Command("images most like yours", commands.SearchOptions, "features.commands:print_neighbors"),
    "duplicates": Command("near-copies, as groups", commands.DuplicatesOptions, "features.commands:print_duplicates"),
    "outliers": Command("images unlike all others", commands.OutliersOptions, "features.commands:print_outliers"),
    "select": Command(
        "fewer images to train on: no near-copies, and all kinds",
        commands.SelectOptions,
        "features.commands:write_selection",
    ),
    "figure tsne": Command("a map of classes (t-SNE)", commands.TsneOptions, "look.figures:draw_tsne"),
    "figure neighbors": Command(
        "where k-NN is right and wrong", commands.NeighborsOptions, "look.figures:draw_neighbor_page"
    ),
    "app": Command("a page to explore what a model sees", commands.AppOptions, "app:command"),
    "report": Command("write a run's report.html again", commands.ReportOptions, "run:report_command"),
    "models": Command(
        "list weights to start from, or download some", commands.ModelsOptions, "weights.starts:models_command"
    ),
    "export": Command(
        "write a model for other libraries and runtimes", commands.ExportOptions, "exports.export:export_command"
    ),
    "recipes": Command("list the named configurations", commands.RecipesOptions, "cli:show_recipes"),
    "completion": Command(
        "what completes commands and options in your shell", commands.CompletionOptions, "cli:print_completion"
    ),
}
GROUPS = {name.split()[0] for name in COMMANDS if " " in name}

# Their modules need PyTorch, so they are known by name.
_FAILURES = "TrainingError", "CheckpointError", "DownloadError", "ExportError", "PushError", "WorkerDied", "LostRank"

FIRST_STEPS = {
    "dino train": "train on built-in drawn scenes: minutes on a laptop",
    "dino train --data photos/ --out runs/a": "train on your own images, any folder, no labels needed",
    "dino train vit_small_100ep --data train/": "a named recipe (see: dino recipes), any option can follow",
    "dino train --data photos/ --minutes 30": "as many epochs as fit into half an hour",
    "dino train mine.toml --epochs 30": "a file is flags written down; flags win",
    "dino train --resume runs/a": "continue an interrupted run, to the bit",
    "dino submit --gpus 8 train --data photos/": "as a job of Slurm, which goes on by itself after its time limit",
    "dino app runs/a": "explore it in a browser: where it looks, what is alike",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 when the work failed, 2 for misuse, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Read as PyTorch is imported. Its threads would wait for each other busily, which takes the cores from themselves as soon
    # as another program runs: a third of the speed was left.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # the CPU computes what PyTorch cannot on Apple's GPUs
    if "RANK" in os.environ:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # `parallel.distribute` says which warning is not needed
    debug = "--debug" in arguments
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show is no reason to stop
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = [a for a in arguments if a != "--debug"]
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _complain("interrupted.", 130)
    except BrokenPipeError:  # the reader of our output has closed it; without this Python complains again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            raise
        name = type(error).__name__
        if isinstance(error, UnicodeEncodeError):
            return _complain(
                f"{error.object[max(0, error.start - 60) : error.end + 20]!r} holds a name that is no UTF-8 text; rename it.",
                2,
            )
        if isinstance(error, ValueError):
            # All ranks of a machine fail alike; one of them says it.
            return _complain(str(error), 2) if os.environ.get("LOCAL_RANK", "0") == "0" else 2
        if name in _FAILURES:
            return _complain(str(error), 1)
        if isinstance(error, OSError) and error.strerror:
            place = f" ({os.fsdecode(error.filename)})" if isinstance(error.filename, str | bytes) else ""
            return _complain(f"{error.strerror}{place}; free space, choose another place, or mend its permissions.", 1)
        if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
            return _complain(
                "the memory is full; use a smaller --size, --batch-size or model, or --fit in training.", 1
            )
        return _complain(f"{name}: {error} (add --debug to see where)", 1)


def _dispatch(arguments: list[str]) -> int:
    if arguments[:1] == ["__complete"]:  # a shell's Tab
        print("\n".join(completion.complete(arguments[1:], {name: c.options for name, c in COMMANDS.items()})))
        return 0
    if arguments[:1] == ["help"]:  # `dino help train` is `dino train --help`
        arguments = [*arguments[1:], "--help"]
    words = [word for word in arguments if word not in ("-h", "--help")]
    if not words or (len(words) == 1 and any(name.startswith(f"{words[0]} ") for name in COMMANDS)):
        print_overview("".join(words))
        return 0
    if arguments[0] in ("--version", "version"):
        print(f"dino {__version__}")
        return 0
    name, options = parse(arguments)
    check_names(options)
    module, _, function = COMMANDS[name].function.partition(":")
    code = getattr(importlib.import_module(f"dino.{module}"), function)(options)
    return code if isinstance(code, int) else 0


def check_names(options: Options) -> None:
    """Refuse models, runs, embeddings and images that are not there, before seconds pass with the import of PyTorch.

    Of a run that is resumed, and of one in several processes, whoever opens them can say more.
    """
    given = flatten(options)
    if given.get("resume") is not None or "RANK" in os.environ:
        return
    for flag in help.list_flags(type(options)):
        name = given[flag.name]
        if not name or not isinstance(name, str):
            continue
        if flag.values == "MODEL":
            names.require_model(name)
        if "://" in name or len(name) > 255 or os.path.exists(os.path.expanduser(name)):
            continue  # where a name is too long, opening it says so
        if flag.values == "EMBEDDING":
            raise names.no_embedding(name)
        if flag.values == "RUN":
            toml.read_recorded(name)
        # Patterns, kinds of data and files of tables have readers with sentences of their own.
        if flag.values == "IMAGES" and not re.search(r"[:{*?\[\n]|^scenes$|\.(tar|parquet)$", name):
            importlib.import_module("dino.data.listing").locate(name)


def print_overview(group: str) -> None:
    """The commands of a group, `eval` or `figure`; "": all, and the first steps."""
    begin = f"dino {group} NAME" if group else "dino COMMAND"
    rows = [(name, command.summary) for name, command in COMMANDS.items() if name.startswith(f"{group} ".lstrip())]
    commands = help.draw_rows(rows, max(len(name) for name, _ in rows) + 4)
    parts = [f"usage: {begin} [OPTIONS]", commands]
    if not group:
        parts.insert(1, help.fill("Self-supervised pre-training of vision models with DINO (Caron et al. 2021)."))
        parts.append("first steps:\n" + help.draw_rows(FIRST_STEPS.items(), 46))
    parts.append(
        help.fill(f"{begin} --help explains every option. --debug after any command shows the traceback of an error.")
    )
    print("\n\n".join(parts))


def parse(arguments: list[str]) -> tuple[str, Options]:
    """The name of a command and its options."""
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name, flags = " ".join(arguments[:words]), arguments[words:]
    if name not in COMMANDS:
        group = sorted(n for n in COMMANDS if n.startswith(f"{name} "))
        known = group or list(COMMANDS)
        near = errors.did_you_mean(" ".join(arguments[:2]), known) or errors.did_you_mean(name, known)
        if group and not errors.did_you_mean("".join(arguments[1:2]), [each.split()[1] for each in group]):
            near = ""  # in "eval runs/a" only the first word is near
        typed = near and not group and "".join(arguments[1:2]) not in COMMANDS
        if meant := find_order(arguments, range(1 if typed else len(arguments))):
            raise ValueError(f"the command comes first; write: dino {shlex.join(meant)}")
        fault = f"'{name}' needs a second word" if group else f"there is no command '{name}'"
        raise ValueError(f"{fault}; known are {', '.join(known)}.{near}")
    kind, flags = COMMANDS[name].options, join_repeated(flags)
    if issubclass(kind, TrainOptions):
        return name, parse_train(flags, kind, name)
    if kind is trainings.SubmitOptions:
        return name, parse_submit(flags)
    return name, parse_flags(kind, flags, f"dino {name}")


def find_order(arguments: list[str], places: Iterable[int]) -> list[str]:
    """The arguments behind the command that begins at one of the `places`, maybe as `knn` or `knn eval`; [] without one."""
    meant: dict[str, str] = {}
    for name in COMMANDS:
        *group, last = name.split()
        meant |= {last: name, " ".join([last, *group]): name}
    meant |= {name: name for name in COMMANDS}
    for place, length in itertools.product(places, (2, 1)):
        if name := meant.get(" ".join(arguments[place : place + length])):
            words = name.split()
            before = [word for word in arguments[:place] if word not in GROUPS]
            return [*words, *(word for word in before + arguments[place + length :] if word not in words)]
    return []


def join_repeated(flags: list[str]) -> list[str]:
    """Flags in which several times --data, or several times --val, became one, whose value has a line for each."""
    for spellings in (["--data", "--data.path"], ["--val"], ["--data.val"]):
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument(*spellings, action="append", nargs="?", dest="values")
        given, others = parser.parse_known_args(flags)
        if len(given.values or ()) > 1 and None not in given.values:
            flags = [*others, f"{spellings[0]}={chr(10).join(given.values)}"]
    return flags


def parse_train(flags: list[str], kind: type[TrainOptions] = TrainOptions, name: str = "train") -> TrainOptions:
    """`[RECIPE | FILE.toml] [FLAGS]` of `dino train` and `dino bench`: flags win over the recipe, the file or the run."""
    recipe = None
    if flags and not flags[0].startswith("-"):
        recipe, *flags = flags
        option, equals, value = recipe.partition("=")
        if equals and not os.path.exists(recipe):
            raise ValueError(f"'{recipe}' is no recipe; write an option as --{option} {shlex.quote(value)}")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, prog=f"dino {name}")
    first.add_argument("--data", "--data.path", nargs="?")
    for flag in ("--resume", "--epochs", "--minutes", "--hours"):
        first.add_argument(flag, nargs="?")
    given, _ = first.parse_known_args(flags)
    has_data = given.data is not None or "--help" in flags or "-h" in flags  # help is not about the demo
    base = free_length(choose_base(recipe, has_data, given.resume, f"dino {name} --data {{}}"), vars(given))
    return parse_flags(kind, flags, f"dino {name} [RECIPE | FILE.toml]", kind(**vars(base)))


def parse_submit(flags: list[str]) -> trainings.SubmitOptions:
    """`[OPTIONS] train [RECIPE | FILE.toml] [FLAGS]` of `dino submit`. A partition, too, may be called `train`."""
    before = ["", *flags]
    places = [i for i, word in enumerate(flags) if word == "train" and (before[i][:2] != "--" or "=" in before[i])]
    own = flags[: places[0]] if places else flags
    options = parse_flags(trainings.SubmitOptions, own, "dino submit [OPTIONS] train [RECIPE | FILE.toml]")
    if not places:
        raise ValueError(
            "dino submit sends a training; write it behind the options: dino submit --gpus 8 train --data ..."
        )
    return dataclasses.replace(options, training=parse_train(flags[places[0] + 1 :], name="submit train"))


def show_recipes(options: commands.RecipesOptions) -> None:
    if options.name:
        import tomli_w

        print(tomli_w.dumps(toml.to_dict(find_recipe(options.name).options)), end="")
        return
    for name, recipe in RECIPES.items():
        print(f"{name}\n    {recipe.about}\n    {recipe.command}\n    expected: {recipe.expected}")


def print_completion(options: commands.CompletionOptions) -> None:
    print(completion.SCRIPTS[options.shell], end="")


def _complain(text: str, code: int) -> int:
    print("dino: " + text.replace("\n", "\\n"), file=sys.stderr)  # names may hold line breaks
    return code
