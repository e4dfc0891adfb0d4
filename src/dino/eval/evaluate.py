"""Run an evaluation: from Python, from the command line, and during training.

An evaluation NAME is the function `evaluate(model, options, device) -> Result` of the module dino.eval.NAME, and an entry
in `dino.options.evaluate.EVALUATIONS`. What the paper reports for it stands in `dino.paper.FIGURES`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import nn

from dino import distributed, errors, files, paper, weights
from dino.data.decode import BadImage
from dino.data.open import open_labeled_pair
from dino.data.specs import find_path
from dino.engine import log
from dino.features import cache
from dino.models import Backbone
from dino.options.evaluate import EVALUATIONS, EvalOptions, LabeledOptions
from dino.options.flags import parse_flags
from dino.options.rules import get_types
from dino.terminal import track
from dino.version import __version__
from dino.weights import fingerprint, runs
from dino.weights.checks import refuse_broken

T = TypeVar("T")
DATA_FIELDS = ("data", "val", "whiten", "originals", "copies", "distractors")
DATA_FIELDS += ("images", "masks", "val_images", "val_masks")


class Result(NamedTuple):
    """What an evaluation found."""

    figures: dict[str, float]  # by name; percent unless the name says otherwise
    protocol: str  # what was done, in a sentence
    data: dict[str, str]  # part -> fingerprint of its images
    counts: dict[str, int]  # part -> number of images used
    details: Mapping[str, Any] = MappingProxyType({})  # what the result file holds beside the figures
    notes: tuple[str, ...] = ()  # what to compare the figures with, or to know of them
    floors: Mapping[str, Mapping[str, float]] = MappingProxyType({})  # figure -> the same of what needs no training

    def __repr__(self) -> str:
        return format_table("Result", self, {}, "")


def evaluate(name: str, model: str | os.PathLike[str] | Backbone, **options: Any) -> Result:
    """Evaluate a model from Python: ``dino.evaluate("knn", "runs/a", data="photos", k=(20,))``.

    Args:
        name: as in ``dino eval NAME``.
        model: a run directory, weight file, release, or a model, which stays on its device.
        options: those of ``dino eval NAME --help``.

    Raises:
        ValueError: no such evaluation, or its data or options are unusable.
    """
    if not isinstance(name, str):
        raise ValueError(f"the first argument is {type(name).__name__}; write dino.evaluate('knn', model, data=...).")
    kind = find_options(name)
    if unknown := sorted(options.keys() - get_types(kind).keys()):
        raise errors.unknown(f"option of `dino eval {name}`", unknown[0], get_types(kind))
    needed = [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]
    if missing := [each for each in needed if each not in options and each != "model"]:
        raise ValueError(f"{missing[0]} is missing; write dino.evaluate('{name}', model, {missing[0]}=...).")
    given: dict[str, Any] = options | {"model": "model" if isinstance(model, nn.Module) else model}
    wanted, backbone = kind(**given), cast(Any, model)
    if isinstance(model, nn.Module):
        refuse_broken(model.state_dict(), getattr(model, "where", "") or "the model")
    else:
        backbone = weights.take(wanted.model, wanted.device)
    return _measure(name, backbone, wanted)


def find_options(name: str) -> type[EvalOptions]:
    """The options of evaluation `name`.

    Raises:
        ValueError: there is no such evaluation.
    """
    return errors.look_up("evaluation", name, EVALUATIONS)[1]


def _measure(name: str, model: Backbone, options: EvalOptions) -> Result:
    assert isinstance(model, nn.Module)
    module = importlib.import_module(f"dino.eval.{name}")
    return module.evaluate(model, options, next(model.parameters()).device)


class EvaluationCallback(NamedTuple):
    """An evaluation of the model in training; all ranks call it."""

    name: str
    options: EvalOptions  # its model is the run directory

    @classmethod
    def parse(cls, text: str, run: Path) -> EvaluationCallback:
        """From what would follow ``dino eval``, without the model: "knn --data photos --k 20".

        Raises:
            ValueError: there is no such evaluation, it has no such options, or its data is not there.
        """
        try:
            name, *flags = shlex.split(text) or [""]
            options = parse_flags(find_options(name), ["run", *flags], f"--log.evaluate '{name} ...'")
            options = dataclasses.replace(options, model=str(run))  # its name may begin with '-'
            _check_data(options)
        except ValueError as error:
            raise ValueError(f"--log.evaluate '{text}': {error}") from error
        return cls(name, options)

    def __call__(self, model: Backbone, step: int) -> dict[str, float]:
        """Figures as ``NAME/figure``. Files that the evaluation writes go to eval/step-STEP of the run."""
        result = Path(self.options.model) / "eval" / f"step-{step:08d}" / f"{self.name}.json"
        with cache.bypass_cache():  # these weights will not be evaluated again
            found = _measure(self.name, model, dataclasses.replace(self.options, json=str(result)))
        return {f"{self.name}/{figure}": value for figure, value in found.figures.items()}


def _check_data(options: EvalOptions) -> None:
    """Refuse data that an evaluation would only miss hours later, when it is first due."""
    for field in DATA_FIELDS:
        spec = getattr(options, field, None)
        if spec and (path := find_path(spec)) is not None and not path.exists():
            raise ValueError(f"{field} is {spec}, which does not exist; check the path.")
    if isinstance(options, LabeledOptions):
        train, k = open_labeled_pair(options.data, options.val)[0], getattr(options, "k", 1) or 1
        if (least := min(k) if isinstance(k, tuple) else k) > len(train):
            raise ValueError(f"k is {least}, but there are only {len(train)} labeled images; lower --k.")


def evaluate_command(options: EvalOptions) -> None:
    """Run an evaluation; print its figures beside the paper's, and keep them."""
    name = next(name for name, (_, kind) in EVALUATIONS.items() if kind is type(options))
    device = distributed.start(options.device)
    try:
        read = weights.read(options.model, only_backbone=True)
        model = weights.build_backbone(read).to(device)
        found, result = measure_for_command(name, model, options)
        if distributed.is_main():
            print(format_table(options.model, found, paper.FIGURES.get(name, {}).get(model.name, {}), model.name))
            for line in (*keep_result(name, options, result, read.step), *advise_report(options.model)):
                print(line)
    finally:
        distributed.stop()


def measure_for_command(name: str, model: Backbone, options: EvalOptions) -> tuple[Result, dict[str, Any]]:
    """What an evaluation found, and what its result file holds."""
    found = _measure(name, model, options)
    return found, {
        "evaluation": name,
        "figures": found.figures,
        "floors": {figure: dict(floors) for figure, floors in found.floors.items()},
        "protocol": found.protocol,
        "notes": list(found.notes),
        "images": found.counts,
        **found.details,
        "data": found.data,
        "model": {"name": options.model, "sha256": fingerprint(cast(Any, model))},
        "options": {k: v for k, v in dataclasses.asdict(options).items() if k not in ("model", "json", "device")},
        "version": __version__,
        "torch": torch.__version__,
    }


def keep_result(name: str, options: EvalOptions, result: dict[str, Any], step: int | None) -> list[str]:
    """Write the result file, and a line for the report of a run; returns what to print of it.

    Args:
        step: of the training, that the weights are of.
    """
    said, run = [], runs.find_run(options.model)
    if path := locate_result(options, name):
        write_result(path, result)
        said.append(f"Written: {path}")
    if run is not None:
        defaults = {field.name: field.default for field in dataclasses.fields(options)}
        changed = {key: value for key, value in result["options"].items() if value != defaults[key]}
        line = {"date": datetime.now().astimezone().isoformat(timespec="minutes"), "step": step}
        line |= {"teacher": "last" if runs.split_name(options.model)[1] else "best", "options": changed}
        try:
            kept = {key: result[key] for key in ("evaluation", "figures", "floors", "images")}
            kept["warning"] = " ".join(note for note in result["notes"] if note.startswith("Warning: "))
            log.record_evaluation(run, line | kept)
        except OSError as error:
            where = "" if path else "; --json FILE writes them elsewhere"
            said.append(f"Warning: {run} does not keep these figures ({error.strerror}){where}.")
    return said


def advise_report(model: str) -> list[str]:
    """How the figures come into the report of a run, if they were kept."""
    run = runs.find_run(model)
    kept = run is not None and (run / log.EVALUATIONS).is_file() and os.access(run, os.W_OK)
    return [f"For the run's report: dino report {shlex.quote(str(run))}"] if kept else []


def format_table(name: str, found: Result, theirs: Mapping[str, float], what: str) -> str:
    """The figures, one to a line, with a column for the paper's figures where it has any.

    Args:
        theirs: the paper's figures, by the same names; what: the model that they are of.
    """
    counts = ", ".join(f"{count:,} {part}" for part, count in found.counts.items())
    width = max(map(len, found.figures), default=0)
    lines = [f"{name}: {counts}", found.protocol]
    if theirs:
        lines.append(f"{'':<{width}}    here   paper ({what})")
    for figure, value in found.figures.items():
        beside = f"  {theirs[figure]:6.1f}" if figure in theirs else ""
        lines.append(f"{figure:<{width}}  {value:6.2f}{beside}")
    return "\n".join([*lines, *found.notes])


def locate_result(options: EvalOptions, name: str) -> Path | None:
    """The file for the result of evaluation `name`; None: none is written, also where the run cannot be written."""
    if options.json is not None:
        return Path(options.json).expanduser()
    if (run := runs.find_run(options.model)) is None:
        return None
    folder = run / "eval" / ("last" * runs.split_name(options.model)[1])
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.json" if folder.is_dir() and os.access(folder, os.W_OK) else None


def locate_work(options: EvalOptions, name: str) -> Path:
    """The folder for the checkpoints of an evaluation that trains, beside its result file.

    Raises:
        ValueError: no result file is written.
    """
    path = locate_result(options, name)
    if path is None:
        raise ValueError(
            f"{options.model} is no run directory that can be written; give --json FILE, beside which checkpoints can lie."
        )
    return path.with_suffix(".training")


def write_result(path: Path, result: dict[str, Any]) -> None:
    with files.naming(path, "choose another --json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, json.dumps(result, indent=2) + "\n")


def measure_each(items: Sequence[Any], measure: Callable[[Any], T], what: str | None = None) -> dict[Any, T | str]:
    """What `measure` finds of each item, or the sentence that says why it cannot be measured, in the order of `items`.

    Every rank takes its share of the items.

    Args:
        what: a label shows a progress bar.
    """

    def attempt(item: Any) -> T | str:
        try:
            return measure(item)
        except (BadImage, ValueError) as error:
            return str(error)

    mine = items[distributed.rank() :: distributed.world_size()]
    share = {item: attempt(item) for item in (track(mine, len(mine), what) if what else mine)}
    found = {item: result for share in distributed.gather(share) for item, result in share.items()}
    return {item: found[item] for item in items}


def choose_view_size(size: int | None, model: Backbone, usual: int) -> int:
    """Shorter side of an evaluation's images, in pixels.

    It is `size` if given. Otherwise it is `usual` for a model trained at 224 pixels or more, and in proportion less for one
    trained at smaller images.

    Raises:
        ValueError: it is smaller than a patch.
    """
    chosen = size or min(usual, usual * model.view_size // 224)
    if chosen < model.patch_size:
        raise ValueError(f"--size is {chosen}, smaller than one patch of {model.patch_size} pixels; use a larger one.")
    return chosen
