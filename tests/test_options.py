"""All options: one check whoever fills them in, choices that are those of the tables, and a list that is reviewed.

A new or changed option changes tests/options.txt; write it again with: python tests/test_options.py
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest

import dino
from dino import cli, distributed
from dino.options import commands, complete_names, evaluate, replace, train, trainings
from dino.options.flags import parse_flags
from dino.options.rules import Options, allows_none, get_plain, get_types
from dino.options.toml import read_toml, to_dict
from dino.options.train import TrainOptions
from helpers import draw_images

LIST = Path(__file__).with_name("options.txt")
CLASSES = [
    kind
    for module in (train, evaluate, commands, trainings)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, Options) and kind.__module__ == module.__name__
]
# What makes options of each class, which has no default for these.
REQUIRED = {"model": "m", "data": "d", "images": ("i",), "a": "a", "b": "b", "clip": "c", "out": "o", "embedding": "e"}
REQUIRED |= {"run": "r", "to": "onnx", "keep": 1, "shell": "bash"}


def make(kind: type[Options], **values: Any) -> Any:
    fields = dataclasses.fields(kind)
    needed = {f.name: REQUIRED[f.name] for f in fields if f.default is dataclasses.MISSING}
    if kind in (evaluate.CopydetectOptions, evaluate.PairsOptions, evaluate.MasksOptions, evaluate.SegmentOptions):
        needed["data"] = "d"
    return kind(**needed | values)


def find_choices(kind: Any) -> tuple[Any, ...]:
    """The values of a Literal, also of one within a tuple."""
    kind = get_plain(kind)
    return get_args(kind) if get_origin(kind) is Literal else find_choices(get_args(kind)[0]) if get_args(kind) else ()


FIELDS = [(kind, name, hint) for kind in CLASSES for name, hint in get_types(kind).items()]


def test_every_options_class_is_looked_at():
    assert len(CLASSES) > 35
    assert {command.options for command in cli.COMMANDS.values()} <= set(CLASSES)
    assert len(FIELDS) > 250


WRONG = {int: (2.5, "3", True), float: ("0.1", True, math.nan, math.inf), bool: (1, "yes"), str: (3, b"a")}


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_wrong_types_and_words_are_refused_with_the_name_of_the_option(kind):
    make(kind)
    for name, hint in get_types(kind).items():
        plain, words = get_plain(hint), find_choices(hint)
        if get_origin(plain) is tuple:
            any_length = get_args(plain)[-1] is ...  # of which a single value is a list of one
            wrong: list[Any] = [{}, (object(),)] if any_length else [3, "3", (object(),) * len(get_args(plain))]
        elif words:
            wrong = [3.5, True, f"{words[0]}x"]
        else:
            wrong = [*WRONG.get(plain, ("section",))]
        if not allows_none(hint):
            wrong.append(None)
        for value in wrong:
            with pytest.raises(ValueError, match=rf"^{kind.section}{name} is .*; .+\.") as error:
                make(kind, **{name: value})
            assert all(str(word) in str(error.value) for word in (words if get_origin(plain) is not tuple else ()))
        if words and isinstance(words[0], str):
            misspelled = words[0] + "x"
            with pytest.raises(ValueError, match=rf"choose one of .*Did you mean '{words[0].replace('+', '.')}'\?"):
                make(kind, **{name: (misspelled,) if get_origin(plain) is tuple else misspelled})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("method.targets", "centering-x", "centering, softmax-batch, sinkhorn, none. Did you mean 'centering'?"),
        ("method.teacher", "ema", "momentum, previous-epoch, previous-iteration, student or frozen:NAME."),
        ("optim.name", "adam", "adamw, sgd, lars, muon. Did you mean 'adamw'?"),
        ("log.every", 2.5, "it must be a whole number."),
        ("batch_size", 12.5, "it must be a whole number."),
        ("optim.lr", "ten", "it must be a number."),
        ("optim.lr", math.nan, "it must be a finite number."),
        ("head.activation", "swish", "gelu, relu."),
        ("method.loss", "hinge", "choose one of cross-entropy, mse, "),
        ("views.global_scale", 0.5, "give 2 values."),
        ("views.blur_prob", (0.5, 2), "give 3 values."),
        ("views.blur_prob", (0.5, 2, 0), "a probability or share lies between 0 and 1."),
    ],
)
def test_nothing_wrong_trains_in_silence(name, value, said, tmp_path):
    """From Python, from a TOML file, and from the file of a run that is resumed."""
    with pytest.raises(ValueError) as error:  # noqa: PT011
        dino.train(data="photos", out=str(tmp_path / "run"), **{name: value})
    assert str(error.value).startswith(f"{name} is ")
    assert said in str(error.value)
    file = tmp_path / "config.toml"
    section, _, leaf = name.rpartition(".")
    text = f'"{value}"' if isinstance(value, str) else str(list(value) if isinstance(value, tuple) else value)
    file.write_text(f"{f'[{section}]' if section else ''}\n{leaf} = {text}\n")
    for attempt in (lambda: read_toml(file), lambda: dino.train(resume=tmp_path), lambda: cli.parse_train([str(file)])):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            attempt()
        assert str(error.value).startswith(f"{file}: {name} is ")
        assert said in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_table_starts_from_no_wrong_file(tmp_path, capsys):
    (file := tmp_path / "mine.toml").write_text("batch_size = 12.5\n")
    assert (
        cli.main(["ablate", "7", "--data", str(tmp_path), "--recipe", str(file), "--out", str(tmp_path / "out")]) == 2
    )
    assert "mine.toml: batch_size is 12.5; it must be a whole number." in capsys.readouterr().err


def test_what_can_be_meant_alone_is_converted():
    options = replace(TrainOptions(), {"optim.lr": 1, "epochs": np.int64(3), "views.global_scale": [0.5, 1]})
    assert repr((options.optim.lr, options.epochs, options.views.global_scale)) == "(1.0, 3, (0.5, 1.0))"
    assert make(evaluate.KnnOptions, data=Path("photos"), k=[5]) == make(evaluate.KnnOptions, data="photos", k=(5,))


def test_a_value_is_checked_after_the_flags_are_read():
    """The sentence is ours, without the parser's frame around it; sections keep their names."""
    for flags, said in (
        (["--optim.lr", "-1"], "optim.lr is -1.0; it cannot"),
        (["--epochs", "0"], "epochs is 0.0; it must"),
    ):
        with pytest.raises(ValueError, match=f"^{said}"):
            parse_flags(TrainOptions, flags, "dino train")


def test_options_survive_being_written_and_read(tmp_path):
    import tomli_w

    options = replace(TrainOptions(), {"epochs": 3, "log.evaluate": ("knn --data x",), "views.global_scale": (0.3, 1)})
    (tmp_path / "a.toml").write_text(tomli_w.dumps(to_dict(options)))
    assert read_toml(tmp_path / "a.toml") == options


def test_choices_are_the_entries_of_the_tables():
    from dino import variants
    from dino.engine import optim
    from dino.eval import finetune, linear
    from dino.exports import compare
    from dino.features import extract, search
    from dino.look import video
    from dino.models import CONVNETS, head, preprocessing, vit
    from dino.models.timm_backbone import TimmBackbone

    def choices(kind: type[Options], name: str) -> set[Any]:
        return set(find_choices(get_types(kind)[name]))

    assert choices(train.MethodOptions, "targets") == set(variants.TARGETS)
    assert choices(train.MethodOptions, "loss") == {*variants.LOSSES, "cosine"}  # which is of a frozen teacher
    assert set(train.TEACHERS) == set(variants.TEACHERS)
    assert choices(train.ModelOptions, "interpolation") == set(get_args(preprocessing.Interpolation))
    assert choices(train.ModelOptions, "resize") == set(get_args(preprocessing.Resize))
    assert choices(train.OptimOptions, "name") == set(optim.OPTIMIZERS)
    assert choices(train.HeadOptions, "activation") == set(head.ACTIVATIONS) == set(get_args(head.Activation))
    assert choices(train.ModelOptions, "pos_interp") == set(get_args(vit.PositionInterpolation))
    assert choices(train.ModelOptions, "stem") == set(get_args(get_type_hints(TimmBackbone.__init__)["stem"]))
    names = ", ".join([*CONVNETS, *vit.HYBRIDS, *vit.SIZES])
    assert f"Backbone: {names}, or timm:NAME" in " ".join(inspect.getsource(train.ModelOptions).split())
    assert choices(TrainOptions, "recompute") == set(get_args(vit.Recompute))
    assert choices(commands.FindOptions, "index") == set(get_args(search.IndexKind))
    assert choices(commands.ExportOptions, "to") == set(compare.FORMATS)
    assert choices(commands.EmbedOptions, "pooling") < set(extract.POOLINGS) == set(get_args(extract.Pooling))
    assert choices(evaluate.LinearOptions, "pooling") == {name for wide in linear.COLUMNS.values() for name in wide}
    assert choices(evaluate.FinetuneOptions, "recipe") == set(finetune.FINETUNE_RECIPES)
    assert choices(commands.VideoOptions, "show") == set(get_args(get_type_hints(video.video_frames)["show"]))


# --- the reviewed list ---------------------------------------------------------------------------------------------


def describe_type(kind: Any) -> str:
    if allows_none(kind):
        return f"{describe_type(get_plain(kind))} | None"
    kind = get_plain(kind)
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    if get_origin(kind) is tuple:
        return " ".join("..." if part is ... else describe_type(part) for part in get_args(kind))
    return kind.__name__


def list_options() -> str:
    """A line for each option of each command; those that `bench` and `submit` have from `train` only once."""
    lines = []
    for command, (_, kind, _) in cli.COMMANDS.items():
        for name, hint in find_leaves(kind, inherited=command != "train"):
            lines.append(f"{command}: {name} {hint}")
    return "\n".join(lines) + "\n"


def find_leaves(kind: type[Options], inherited: bool) -> list[tuple[str, str]]:
    leaves = []
    defaults = {f.name: f.default for f in dataclasses.fields(kind)}
    for name, hint in get_types(kind).items():
        if inherited and issubclass(kind, TrainOptions) and name in get_types(TrainOptions):
            continue
        if get_plain(hint) is TrainOptions:  # of `submit`
            continue
        if isinstance(get_plain(hint), type) and issubclass(get_plain(hint), Options):
            leaves += find_leaves(get_plain(hint), inherited=False)
            continue
        default = "" if defaults[name] is dataclasses.MISSING else f" = {defaults[name]!r}"
        positional = any("Positional" in repr(mark) for mark in getattr(hint, "__metadata__", ()))
        leaves.append(
            (f"{'' if positional else '--'}{kind.section}{name}".replace("_", "-"), describe_type(hint) + default)
        )
    return leaves


def test_the_list_of_options_is_the_reviewed_one():
    assert list_options() == LIST.read_text(), "options changed: run `python tests/test_options.py` and review the diff"


if __name__ == "__main__":
    LIST.write_text(list_options())


def test_names_without_dots_mean_the_only_option_that_ends_so():
    known = ["epochs", "data.path", "model.arch", "optim.lr", "a.size", "b.size"]
    given = {"epochs": 3, "data": "x", "model": "vit_small", "lr": 0.1, "a.size": 1, "nosuch": 2}
    wanted = ["epochs", "data.path", "model.arch", "optim.lr", "a.size", "nosuch"]
    assert complete_names(given, known) == dict(zip(wanted, given.values(), strict=True))
    with pytest.raises(ValueError, match=r"'size' may be a.size or b.size; write \*\*\{'a.size': ...\}"):
        complete_names({"size": 1}, known)
    with pytest.raises(ValueError, match=r"optim\.lr is given twice"):
        complete_names({"lr": 1, "optim.lr": 2}, known)


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ((), {"model": "vit_smal"}, "no architecture 'vit_smal'|Did you mean 'vit_small'"),
        ((), {"lr": -1}, "optim.lr is -1.0; it cannot be negative"),
        ((), {"epoch": 3}, "Did you mean 'epochs'"),
        ((5,), {}, r"recipe is 5; give a recipe's name or a TOML file, and images as dino.train\(data=...\)"),
        (("photos/",), {}, r"'photos/' is not a recipe; to train on images write: dino.train\(data=\"photos/\"\)"),
        (("photos",), {}, r"'photos' is not a recipe; to train on images write: dino.train\(data=\"photos\"\)"),
    ],
)
def test_training_from_python_says_what_was_meant(arguments, options, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_images(tmp_path / "photos")
    data = {} if arguments else {"data": "photos"}
    with pytest.raises(ValueError, match=said):
        dino.train(*arguments, out="run", **data, **options)
    assert not (tmp_path / "run").exists()


def test_the_package_lists_its_functions():
    names = dir(dino)
    assert {"train", "load", "embed", "search", "evaluate", "attention_maps", "__version__"} <= set(names)
    assert all(getattr(dino, name) is not None for name in names)


def test_python_callers_are_told_the_choices(tmp_path):
    """Public functions that take no options class: the value, and what there is."""
    model = dino.create("vit_nano", 8, 16)
    for call, said in (
        (lambda: dino.embed("m", "d", tmp_path / "e", pooling="mean"), "no pooling 'mean'; known are cls, average"),
        (
            lambda: dino.DinoFeatures(dino.create("vit_nano", 8, 16), pooling="mean").fit(
                [np.zeros((9, 9, 3), np.uint8)]
            ),
            "no pooling 'mean'",
        ),
        (lambda: distributed.start("gpu"), "no device 'gpu'; known are auto, cpu, cuda"),
        (
            lambda: dino.export("m", "onx", str(tmp_path / "m.onnx")),
            "no format 'onx'; known are .* Did you mean 'onnx'",
        ),
        (lambda: dino.evaluate("knn", "m", data="d", kk=(5,)), "no option of `dino eval knn` 'kk'"),
        (lambda: dino.evaluate("knn", Path("m"), data=Path("d"), temp=math.nan), "temp is nan; it must be a finite"),
        (lambda: dino.evaluate("knn", 3, data="d"), "model is 3; it must be text"),
        (lambda: dino.embed(Path("m"), Path("d"), Path("e"), size=math.nan), "size is nan; it must be a whole number"),
        (lambda: dino.embed("m", 3, "e"), "data is 3; it must be text"),
        (lambda: dino.search("e", ["i"], k=0), "k is 0; it must be at least 1"),
        (lambda: dino.duplicates("e", threshold=math.nan), "threshold is nan; it must be a finite"),
        (lambda: dino.attention_maps(model, "i", mass=2), "mass is 2.0; the share of attention"),
        (lambda: dino.pca_colors(model, ["i"], size=10**9), "size is 1000000000; it must lie between"),
        (lambda: dino.video_frames(model, "v", show="no"), "show is 'no'; choose one of attention"),
        (lambda: dino.finer_patches(model, 1.5), "stride is 1.5; it must be a whole"),
        (lambda: dino.export("m", "onnx", "o", num_heads=-1), "num_heads is -1; it must be at least 1"),
        (lambda: dino.create("vit_nano", drop_path=math.inf), r"drop_path is inf; it must be in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
