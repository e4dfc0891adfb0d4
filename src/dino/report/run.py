"""What a run directory says about its run: options, metrics, unreadable images, and figures derived from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from dino.engine import prototypes
from dino.engine.best import MEASURES
from dino.engine.build import Plan
from dino.engine.log import read_metrics, read_quarantine
from dino.engine.monitor import Collapse, CollapseMonitor
from dino.options import required
from dino.options.toml import read_recorded
from dino.options.train import TrainOptions

FLOORS = {"pixels": "raw pixels", "colors": "color histograms"}


@dataclass(frozen=True)
class Run:
    folder: Path
    options: TrainOptions
    lines: list[dict[str, Any]]  # of metrics.jsonl
    quarantine: list[dict[str, Any]]  # lines of quarantine.jsonl
    num_images: int

    @classmethod
    def read(cls, folder: Path, num_images: int) -> Run:
        """The run in `folder`, which trains on `num_images` images."""
        options = read_recorded(str(folder))
        lines = read_metrics(folder / "metrics.jsonl")
        return cls(folder, options, lines, read_quarantine(folder / "quarantine.jsonl"), num_images)

    @property
    def steps(self) -> int:
        """Steps done."""
        return max((line["step"] for line in self.lines), default=0)

    @property
    def total(self) -> int:
        """Steps planned."""
        return Plan(self.options, max(1, self.num_images // required(self.options.batch_size))).total

    @property
    def complete(self) -> bool:
        return self.steps >= self.total

    @property
    def max_entropy(self) -> float:
        """ln K, the largest entropy of targets over K prototypes, nats."""
        return math.log(self.options.head.out_dim or 1)

    def get_metric(self, name: str) -> tuple[list[float], list[float]]:
        """Steps at which the metric `name` was written, and its values."""
        chosen = [line for line in self.lines if isinstance(line.get(name), int | float)]
        return [line["step"] for line in chosen], [line[name] for line in chosen]

    @property
    def knn(self) -> str | None:
        """The metric of the k-NN accuracy to show: k = 20, or k = 10 where there are too few training images."""
        return next((name for name in ("knn20_top1", "knn10_top1") if self.get_metric(name)[0]), None)

    @property
    def words(self) -> tuple[str, str]:
        """The network before the first step, and the one that the run keeps, for figures."""
        return ("before", "after") if self.options.init else ("untrained", "trained")

    @cached_property
    def kept(self) -> float:
        """The step of the teacher that the run keeps: the best, or the last where none was measured.

        It is 0 where the weights that the run started from were never reached.
        """
        measured = next((self.get_metric(name) for name in MEASURES if self.get_metric(name)[0]), ([], []))
        later = [(value, step) for step, value in zip(*measured, strict=True) if step > 0 or self.options.init]
        return max(later)[1] if later else self.steps

    def compare(self, name: str) -> tuple[float | None, float | None]:
        """A metric before the first step, and of the teacher that the run keeps (of the last, where it keeps the start).

        None: it was not measured.
        """
        steps, values = self.get_metric(name)
        before = values[0] if steps and steps[0] == 0 else None
        later = [value for step, value in zip(steps, values, strict=True) if 0 < step <= (self.kept or self.steps)]
        return before, later[-1] if later else None

    @property
    def floors(self) -> dict[str, float]:
        """The same k-NN accuracy of what needs no training."""
        found = {what: self.get_metric(f"{name}_{self.knn}")[1][:1] for name, what in FLOORS.items()}
        return {what: value[0] for what, value in found.items() if value}

    @cached_property
    def seconds(self) -> float:
        """Time spent in training steps; measuring and saving are not counted."""
        steps, rates = self.get_metric("images_per_second")
        batch, before, total = required(self.options.batch_size), 0.0, 0.0
        for step, rate in zip(steps, rates, strict=True):
            total += (step - before) * batch / rate if rate > 0 else 0
            before = step
        return total

    @property
    def rate(self) -> float | None:
        """Images per second of training, on average."""
        return self.steps * required(self.options.batch_size) / self.seconds if self.seconds > 0 else None

    @cached_property
    def collapses(self) -> dict[int, tuple[Collapse | Literal[""], str]]:
        """Collapses by step, with their warnings. The monitor of training reads the logged numbers once more."""
        monitor, found = CollapseMonitor(self.options.head.out_dim or 1), {}
        names = {"teacher_entropy", "kl", "prototype_usage", "teacher_temp"}
        for line in self.lines:
            if (line.keys() >= names or "target_spread" in line) and (text := monitor.look(line["step"], line)):
                found[line["step"]] = monitor.reported, text
        return found

    def list_warnings(self) -> list[tuple[int, str]]:
        """(step, text) of the collapse warnings."""
        found = {step: text for step, (_, text) in self.collapses.items()}
        for line in self.lines:
            if line.get("collapse"):
                found.setdefault(line["step"], "the run reported a collapse here.")
        for line in [line for line in self.lines if "prototypes_unique" in line][-1:]:
            if text := prototypes.advise(line["step"], line, self.options.head.out_dim or 1):
                found.setdefault(line["step"], text)
        return sorted(found.items())
