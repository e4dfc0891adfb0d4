"""What all evaluations share: the model and its data opened, the figures printed beside the paper's and written down.

An evaluation is a module with `evaluate(model, options, device) -> Judgement`, the same from the command line, from
Python and as a training callback, and `PAPER`: model as `paper_name` calls it -> figure -> value.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor

from dino import __version__, distributed, errors, files, weights
from dino.data.scenes import Scenes, scenes_of
from dino.data.sources import Source, open_source, split, subset
from dino.data.torchvision_sets import TORCHVISION, torchvision_pair
from dino.features import cache
from dino.features.cache import fingerprint
from dino.features.extract import Features
from dino.models import Backbone, VisionTransformer
from dino.models.vit import SIZES
from dino.options.evaluate import EVALUATIONS, EvalOptions
from dino.options.train import known

MOST_HELD_OUT, HELD_OUT_SCENES = 1000, 500


class Judgement(NamedTuple):
    """What an evaluation found."""

    figures: dict[str, float]  # by name; percent unless the name says otherwise
    protocol: str  # what was done, in a sentence
    data: dict[str, str]  # part -> fingerprint of its images
    counts: dict[str, int]  # part -> number of images used
    details: Mapping[str, Any] = MappingProxyType({})  # what the result file holds beside the figures


def evaluate(name: str, model: str | Backbone, **options: Any) -> Judgement:
    """Evaluate a model from Python: ``dino.evaluate("knn", "runs/a", data="photos", k=(20,))``.

    Args:
        name: as in ``dino eval NAME``.
        model: a run directory, weight file, release, or a model; a model is evaluated where it lies.
        options: those of ``dino eval NAME --help``.

    Raises:
        ValueError: no such evaluation, or its data or options are unusable.
    """
    wanted = options_of(name)(model=model if isinstance(model, str) else "model", **options)
    if isinstance(model, str):
        return _work(wanted, name, weights.load(model).to(distributed.start(wanted.device)))
    return _work(wanted, name, model)


def options_of(name: str) -> type[EvalOptions]:
    if name not in EVALUATIONS:
        raise errors.unknown("evaluation", name, EVALUATIONS)
    return EVALUATIONS[name][1]


def _work(options: EvalOptions, name: str, model: Backbone) -> Judgement:
    return _module(name).evaluate(model, options, next(model.parameters()).device)


def _module(name: str) -> Any:
    return importlib.import_module(f"dino.eval.{name}")


class Callback(NamedTuple):
    """An evaluation that looks at a model in training; all ranks call it."""

    name: str
    options: EvalOptions
    run: Path

    @classmethod
    def parse(cls, text: str, run: Path) -> Callback:
        """From what would follow ``dino eval``, without the model: "knn --data photos --k 20".

        Raises:
            ValueError: there is no such evaluation, or it has no such options.
        """
        name, *flags = shlex.split(text) or [""]
        kind = options_of(name)
        try:
            options = tyro.cli(kind, args=[str(run), *flags], prog=f"--log.evaluate '{name} ...'")
        except SystemExit as stop:  # it has said why
            raise ValueError(f"--log.evaluate '{text}' is not understood; see `dino eval {name} --help`.") from stop
        return cls(name, options, run)

    def __call__(self, model: Backbone, step: int) -> dict[str, float]:
        """Figures as ``NAME/figure``; what else it writes goes to eval/step-STEP of the run."""
        options = dataclasses.replace(
            self.options, json=str(self.run / "eval" / f"step-{step:08d}" / f"{self.name}.json")
        )
        with cache.unused():  # no model is looked at twice
            found = _work(options, self.name, model)
        return {f"{self.name}/{figure}": value for figure, value in found.figures.items()}


def command(options: EvalOptions) -> None:
    """Run an evaluation; print and write what it found."""
    name = next(name for name, (_, kind) in EVALUATIONS.items() if kind is type(options))
    device = distributed.start(options.device)
    try:
        model = weights.load(options.model).to(device)
        found = _work(options, name, model)
        result = {
            "evaluation": name,
            "figures": found.figures,
            "protocol": found.protocol,
            "images": found.counts,
            **found.details,
            "data": found.data,
            "model": {"name": options.model, "sha256": fingerprint(model)},
            "options": {k: v for k, v in dataclasses.asdict(options).items() if k not in ("model", "json", "device")},
            "version": __version__,
            "torch": torch.__version__,
        }
        if distributed.is_main():
            called = paper_name(model)
            print(table(options.model, found, _module(name).PAPER.get(called, {}), called))
            if written := _write(options, name, result):
                print(f"Written: {written}")
    finally:
        distributed.stop()


def table(name: str, found: Judgement, theirs: Mapping[str, float], what: str) -> str:
    """Figures in lines, with a column of the paper's where it has any for such a model."""
    counts = ", ".join(f"{count:,} {part}" for part, count in found.counts.items())
    width = max(map(len, found.figures), default=0)
    lines = [f"{name}: {counts}", found.protocol]
    if theirs:
        lines.append(f"{'':<{width}}    here   paper ({what})")
    for figure, value in found.figures.items():
        beside = f"  {theirs[figure]:6.1f}" if figure in theirs else ""
        lines.append(f"{figure:<{width}}  {value:6.2f}{beside}")
    return "\n".join(lines)


def result_path(options: EvalOptions, name: str) -> Path | None:
    """Where the result of evaluation `name` goes; None: nowhere."""
    if options.json is not None:
        return Path(options.json)
    if (Path(options.model) / "config.toml").is_file():
        return Path(options.model) / "eval" / f"{name}.json"
    return None


def work_folder(options: EvalOptions, name: str) -> Path:
    """Where an evaluation that trains keeps its checkpoints: beside the result, under its name.

    Raises:
        ValueError: there is no such place.
    """
    path = result_path(options, name)
    if path is None:
        raise ValueError(f"{options.model} is no run directory; give --json FILE, beside which checkpoints can lie.")
    return path.with_suffix(".training")


def _write(options: EvalOptions, name: str, result: dict[str, Any]) -> Path | None:
    path = result_path(options, name)
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise ValueError(
            f"the result cannot be written to {path} ({error.strerror}); choose another --json."
        ) from error
    return path


def paper_name(model: Backbone) -> str:
    """What the paper calls such a model, e.g. "vit_small/16"; "" when it has none."""
    if isinstance(model, VisionTransformer):
        sizes = (model.embed_dim, model.depth, model.num_heads)
        arch = next((name for name, known in SIZES.items() if known == sizes), "")
        return f"{arch}/{model.patch_size}" if arch else ""
    return str(getattr(model, "name", ""))


# --- labelled data --------------------------------------------------------------------------------------------------


def split_folders(data: str, val: str | None) -> tuple[str, str | None]:
    """Training and test folders of `data` where it holds train/ and val/; else itself and what was given."""
    root = Path(data)
    if val is None and (root / "train").is_dir() and (root / "val").is_dir():
        return str(root / "train"), str(root / "val")
    return data, val


def labelled_pair(data: str, val: str | None) -> tuple[Source, Source]:
    """Labelled training and test images that agree on their classes.

    Raises:
        ValueError: there are no class folders, too few images, or the classes differ.
    """
    train, val = split_folders(data, val)
    if (scenes := open_scenes(train)) is not None:
        return scenes
    if train.startswith(TORCHVISION):
        return torchvision_pair(train)
    bank = open_labelled(train)
    if len(bank.classes) < 2:
        raise ValueError(
            f"--data {data} has one class only, '{''.join(bank.classes)}'; give a folder of two classes or more, or one with "
            "such folders train/ and val/."
        )
    if val is not None:
        return agreeing(bank, open_labelled(val))
    bank, test = split(bank, 0.1, MOST_HELD_OUT, 0)
    if test is None:
        raise ValueError(f"--data {data} holds too few images to set some aside; give test images with --val.")
    return bank, test


def open_labelled(path: str) -> Source:
    """The images of a folder that lie in one of its class folders."""
    source = open_source(path, "folders")
    labels = known(source.labels)
    if (labels >= 0).all():
        return source
    if distributed.is_main():
        print(f"{(labels < 0).sum()} images of {path} lie in no class folder and are left out.")
    return subset(source, np.flatnonzero(labels >= 0))


def labels_of(source: Source, found: Features, what: str) -> Tensor:
    """[m] int64, of the images that could be read; the others are counted and one is named.

    Raises:
        ValueError: none could be read.
    """
    say_bad(found.bad, what)
    if not len(found.indices):
        raise ValueError(f"none of the {len(source)} {what} images can be read; check the data folder.")
    return torch.from_numpy(known(source.labels)[found.indices])


def say_bad(bad: list[tuple[str, str]], what: str) -> None:
    if bad and distributed.is_main():
        print(f"{len(bad)} {what} images could not be read, first: {bad[0][0]} ({bad[0][1]})")


def open_scenes(spec: str) -> tuple[Scenes, Scenes] | None:
    """Training and held-out drawn scenes where `spec` is 'scenes' or 'scenes:NUMBER'."""
    scenes = scenes_of(spec)
    return None if scenes is None else (scenes, Scenes(HELD_OUT_SCENES, first=len(scenes)))


def agreeing(train: Source, test: Source) -> tuple[Source, Source]:
    """Both, if their class numbers mean the same; numbers are given by each folder on its own."""
    if train.classes and test.classes and train.classes != test.classes:
        only = min(set(train.classes) ^ set(test.classes))
        raise ValueError(
            f"training and held-out images differ in their classes, for example '{only}'; make them agree "
            "(training also works with --data.labels none)."
        )
    return train, test
