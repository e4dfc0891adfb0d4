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

import torch

from dino import distributed, errors, files, weights
from dino.features import cache
from dino.models import Backbone
from dino.options.evaluate import EVALUATIONS, EvalOptions
from dino.options.flags import parse_flags
from dino.version import __version__
from dino.weights import fingerprint


class Result(NamedTuple):
    """What an evaluation found."""

    figures: dict[str, float]  # by name; percent unless the name says otherwise
    protocol: str  # what was done, in a sentence
    data: dict[str, str]  # part -> fingerprint of its images
    counts: dict[str, int]  # part -> number of images used
    details: Mapping[str, Any] = MappingProxyType({})  # what the result file holds beside the figures


def evaluate(name: str, model: str | Backbone, **options: Any) -> Result:
    """Evaluate a model from Python: ``dino.evaluate("knn", "runs/a", data="photos", k=(20,))``.

    Args:
        name: as in ``dino eval NAME``.
        model: a run directory, weight file, release, or a model; a model is evaluated where it lies.
        options: those of ``dino eval NAME --help``.

    Raises:
        ValueError: no such evaluation, or its data or options are unusable.
    """
    wanted = find_options(name)(model=model if isinstance(model, str) else "model", **options)
    if isinstance(model, str):
        return _work(wanted, name, weights.load(model).to(distributed.start(wanted.device)))
    return _work(wanted, name, model)


def find_options(name: str) -> type[EvalOptions]:
    if name not in EVALUATIONS:
        raise errors.unknown("evaluation", name, EVALUATIONS)
    return EVALUATIONS[name][1]


def _work(options: EvalOptions, name: str, model: Backbone) -> Result:
    return _module(name).evaluate(model, options, next(model.parameters()).device)


def _module(name: str) -> Any:
    return importlib.import_module(f"dino.eval.{name}")


class EvaluationCallback(NamedTuple):
    """An evaluation that looks at a model in training; all ranks call it."""

    name: str
    options: EvalOptions
    run: Path

    @classmethod
    def parse(cls, text: str, run: Path) -> EvaluationCallback:
        """From what would follow ``dino eval``, without the model: "knn --data photos --k 20".

        Raises:
            ValueError: there is no such evaluation, or it has no such options.
        """
        name, *flags = shlex.split(text) or [""]
        kind = find_options(name)
        try:
            options = parse_flags(kind, [str(run), *flags], f"--log.evaluate '{name} ...'")
        except ValueError as error:
            raise ValueError(f"--log.evaluate '{text}': {error}") from error
        except SystemExit as stop:  # the parser has said why
            raise ValueError(f"--log.evaluate '{text}' is not understood; see `dino eval {name} --help`.") from stop
        return cls(name, options, run)

    def __call__(self, model: Backbone, step: int) -> dict[str, float]:
        """Figures as ``NAME/figure``; what else it writes goes to eval/step-STEP of the run."""
        options = dataclasses.replace(
            self.options, json=str(self.run / "eval" / f"step-{step:08d}" / f"{self.name}.json")
        )
        with cache.bypass_cache():  # no model is looked at twice
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
            print(format_table(options.model, found, _module(name).PAPER.get(model.name, {}), model.name))
            if written := _write(options, name, result):
                print(f"Written: {written}")
    finally:
        distributed.stop()


def format_table(name: str, found: Result, theirs: Mapping[str, float], what: str) -> str:
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


def locate_result(options: EvalOptions, name: str) -> Path | None:
    """Where the result of evaluation `name` goes; None: nowhere."""
    if options.json is not None:
        return Path(options.json)
    if (Path(options.model) / "config.toml").is_file():
        return Path(options.model) / "eval" / f"{name}.json"
    return None


def locate_work(options: EvalOptions, name: str) -> Path:
    """Where an evaluation that trains keeps its checkpoints: beside the result, under its name.

    Raises:
        ValueError: there is no such place.
    """
    path = locate_result(options, name)
    if path is None:
        raise ValueError(f"{options.model} is no run directory; give --json FILE, beside which checkpoints can lie.")
    return path.with_suffix(".training")


def _write(options: EvalOptions, name: str, result: dict[str, Any]) -> Path | None:
    path = locate_result(options, name)
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


# --- labeled data --------------------------------------------------------------------------------------------------
