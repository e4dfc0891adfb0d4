"""The verdict on a run in words: is its model better than what needs no training, and if not, why, and what to run next.

Every rule reads what the run recorded. A difference counts only above two standard errors, because few images are held out.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dino.engine.health import measure_margin
from dino.options import flatten, replace, required
from dino.options.auto import LITTLE_DATA
from dino.options.train import TrainOptions
from dino.report.run import Run
from dino.weights.starts import STARTS

RELEASED = STARTS[0].name  # a good start for photographs of all kinds
FEW_IMAGES, FEW_STEPS = 500, 1000  # below, hardly any run learns much
MANY_EPOCHS = 3000
ENOUGH_STEPS = 4000  # what the automatic choice gives to few images
# Points above chance; on CIFAR-10 raw pixels have 5, an untrained ViT 18, one trained without jitter 24.
COLOR_EXCESS = 10


class Reason(NamedTuple):
    """Why a run is not better, or could be better yet, and what to run next."""

    name: Literal["collapse", "stopped", "few images", "few steps", "color", "rising", "hurts", "unclear"]
    text: str
    command: str


@dataclass(frozen=True)
class Verdict:
    """`outcome`: the model is better than every floor (untrained, raw pixels, color histograms), or not, or nobody knows."""

    outcome: Literal["better", "not", "unknown"]
    headline: str
    sentences: list[str]
    reason: Reason | None

    @property
    def lines(self) -> list[str]:
        """For the terminal."""
        why = "Why: " if self.outcome == "not" else ""
        more = [f"{why}{self.reason.text}", f"Next: {self.reason.command}"] if self.reason else []
        return [f"Verdict: {self.headline}", *self.sentences, *more]


def warn(options: TrainOptions, steps: int) -> list[str]:
    """What to say before a run that will hardly learn (one that starts from weights needs less), or long learns nothing."""
    if (options.epochs or 0) > MANY_EPOCHS:
        return [
            f"{options.epochs:,.0f} epochs are more than a run is known to gain from; --epochs 800 are many, and the time is "
            "better spent on more images."
        ]
    if steps >= FEW_STEPS or options.init is not None:
        return []
    return [f"{steps:,} steps are few; a model goes on learning for some thousands (--minutes or --epochs)."]


def advise_start(options: TrainOptions, images: int) -> str:
    """That released weights are likely the better start for so few photographs, with the command; "" if they are not."""
    if options.init or options.method.frozen or images >= LITTLE_DATA or options.data.path.startswith("scenes"):
        return ""
    command = ["dino", "train", "--init", RELEASED, *_write_data(options)]
    return f"Of photographs, {images:,} are few: starting from released weights is likely better: {shlex.join(command)}"


def _write_data(options: TrainOptions) -> list[str]:
    given = {"--data": options.data.path, "--data.val": options.data.val, "--data.labels": options.data.labels}
    words = [(name, line) for name, value in given.items() if value not in (None, "auto") for line in value.split("\n")]
    weights = ["--data.weights", *(f"{weight:g}" for weight in options.data.weights)] if options.data.weights else []
    return [word for pair in words for word in pair] + weights


def judge(run: Run) -> Verdict:
    """The verdict on what was measured last."""
    before, after = run.compare(run.knn) if run.knn else (None, None)
    start = "the weights it started from" if run.options.init else "the untrained network"
    floors = ({} if before is None else {start: before}) | run.floors
    if after is None or not floors:
        return _judge_without_labels(run)
    count = int(max(run.get_metric("knn_queries")[1], default=0))
    margins = {what: measure_margin(after, value, count) for what, value in floors.items()}
    groups = {
        "better than": [what for what in floors if after - floors[what] > margins[what]],
        "not measurably better than": [what for what in floors if abs(after - floors[what]) <= margins[what]],
        "worse than": [what for what in floors if floors[what] - after > margins[what]],
    }
    headline = ", ".join(f"{how} {_join(names)}" for how, names in groups.items() if names) + "."
    sentences = [
        f"On {count:,} held-out images a difference of up to {max(margins.values()):.1f} points may be chance."
    ]
    if alike := run.get_metric("cka_start")[1]:
        sentences.append(
            f"Likeness of its features to those of the start (linear CKA): {alike[-1]:.2f}; 1 is the same."
        )
    reasons = _find_reasons(run, is_rising(run, count), "color histograms" in groups["better than"])
    if len(groups["better than"]) < len(floors):
        return Verdict("not", headline, sentences, next(reasons))
    return Verdict("better", headline, sentences, next((r for r in reasons if r.name in ("stopped", "rising")), None))


def _judge_without_labels(run: Run) -> Verdict:
    folder, sentences = shlex.quote(str(run.folder)), []
    for name, what in (("effective_rank", "Effective rank"), ("two_crop_retrieval", "Two-crop retrieval")):
        before, after = run.compare(name)
        if before is not None and after is not None:
            sentences.append(f"{what}: {before:.1f} {run.words[0]} -> {after:.1f} {run.words[1]}.")
    if run.knn is None:
        sentences.append(
            "To give labels, sort images into a folder for each class, or list path,label in a CSV file (--data.labels); "
            f"they are never trained on. Later: dino eval knn {folder} --data FOLDER"
        )
    reason = next(_find_reasons(run))
    if reason.name == "collapse":
        return Verdict("not", "the model collapsed in training.", sentences, reason)
    if reason.name == "unclear" or (reason.name == "few steps" and run.steps >= FEW_STEPS):
        reason = Reason("unclear", "Look at nearest images and attention yourself.", f"dino app {folder}")
    why = "without labels of held-out images no accuracy can be" if run.knn is None else "nothing to compare has been"
    return Verdict("unknown", f"unknown, as {why} measured.", sentences, reason)


def is_rising(run: Run, count: int) -> bool:
    """Whether the k-NN accuracy rose measurably in the second half of the run."""
    steps, values = run.get_metric(required(run.knn))
    late = [value for step, value in zip(steps, values, strict=True) if 2 * step >= run.total]
    return len(late) > 1 and late[-1] - late[0] > measure_margin(late[-1], late[0], count)


def _find_reasons(run: Run, rising: bool = False, beyond_color: bool = False) -> Iterator[Reason]:
    """Why a run is not better, the most certain reason first; the last is that none is known.

    Args:
        rising: its accuracy rose to the end.
        beyond_color: it is better than color histograms.
    """
    o, steps = run.options, f"{run.steps:,} steps"
    per_epoch = run.total / required(o.epochs)
    longer = _repeat(run, {"epochs": max(2 * required(o.epochs), math.ceil(ENOUGH_STEPS / per_epoch))})
    released = shlex.join(["dino", "train", "--init", RELEASED, *_write_data(o), "--out", _name_next(run)])
    for step, (kind, _) in reversed(run.collapses.items()):
        text = f"It collapsed by step {step:,}: its targets no longer differed from image to image."
        yield Reason("collapse", text, _repeat(run, *_list_cures(o, kind)))
    if o.init and run.kept == 0:
        text = "No check found better than the weights it started from, so the run keeps those."
        part = {"start.train": "attention-proj" if "vit" in required(o.model.arch) else "norms"}
        yield Reason("hurts", text, _repeat(run, {"optim.lr": required(o.optim.lr) / 4} | part))
    elif not run.complete:
        resume = shlex.join(["dino", "train", "--resume", str(run.folder)])
        yield Reason("stopped", f"It stopped after {run.steps:,} of {run.total:,} steps.", resume)
    if run.num_images < FEW_IMAGES and o.init is None:
        yield Reason("few images", f"{run.num_images:,} images are too few; start from released weights.", released)
    if run.steps < FEW_STEPS:
        yield Reason("few steps", f"{steps} are too few; it takes some thousands.", longer)
    alike, chance = (run.compare(f"color_agreement{end}")[1] for end in ("", "_chance"))
    by_color = alike is not None and chance is not None and alike - chance > COLOR_EXCESS
    if by_color and not beyond_color and o.model.in_channels == 3:
        text = f"It goes by color: {alike:.0f} % of the nearest images are also the nearest by color histogram"
        gray, jitter = max(0.5, o.views.gray_prob), max(0.8, o.views.jitter_prob)
        both = {"views.gray_prob": gray, "views.jitter_prob": jitter}
        command = _repeat(run, both, {"views.gray_prob": 0.8}, {"model.in_channels": 1})
        yield Reason("color", f"{text} ({chance:.0f} % by chance).", command)
    if rising:
        yield Reason("rising", "It was still rising when it ended.", longer)
    if run.steps < ENOUGH_STEPS:
        yield Reason("few steps", f"{steps} are few; it takes some thousands.", longer)
    text = "None of the usual causes shows (collapse, color, too few steps or images)."
    yield Reason("unclear", text, longer if o.init else released)


def _list_cures(o: TrainOptions, collapse: str) -> list[dict[str, Any]]:
    """What to change after a collapse, first things first, as `dino.engine.monitor` advises."""
    now = flatten(o)
    temps = {name: min(0.03, now[name]) for name in ("method.teacher_temp_start", "method.teacher_temp")}
    cures: dict[str, list[dict[str, Any]]] = {
        "uniform": [temps, {"head.out_dim": max(2, (o.head.out_dim or 1) // 4)}],
        "dominated": [{"method.targets": "centering", "method.center_momentum": 0.9}, {"method.targets": "sinkhorn"}],
        "same": [{"method.targets": "sinkhorn"}],
        "point": [{"head.predictor": True}, {"method.targets": "centering"}],
    }
    return [{"method.teacher": "momentum"}, *cures[collapse], {"optim.lr": required(o.optim.lr) / 4}]


def _repeat(run: Run, *candidates: dict[str, Any]) -> str:
    """The command of the same run with the first of the changes that change something and are valid."""
    now, flags = flatten(run.options), []
    for changes in candidates:
        changes = {name: value for name, value in changes.items() if value != now[name]}
        with contextlib.suppress(ValueError):
            replace(run.options, changes)
            flags = [word for name, value in changes.items() for word in _write_flag(name, value)]
        if flags:
            break
    return shlex.join(["dino", "train", str(run.folder / "config.toml"), *flags, "--out", _name_next(run)])


def _write_flag(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    return [flag] if value is True else [flag, f"{value:g}" if isinstance(value, float) else str(value)]


def _name_next(run: Run) -> str:
    """A folder beside the run's that is not there yet."""
    names = (f"{run.folder}-{number}" for number in itertools.count(2))
    return next(name for name in names if not Path(name).exists())


def _join(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
