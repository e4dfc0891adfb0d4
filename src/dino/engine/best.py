"""The best teacher of a run so far: by held-out k-NN where there are labels, else by a score that needs none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dino.weights import runs
from dino.weights.formats import State
from dino.weights.runs import Best

WITHOUT_LABELS = "two_crop_retrieval"  # the metric that chooses where there is no k-NN; see `dino.engine.health`
MEASURES = ("knn20_top1", "knn10_top1", WITHOUT_LABELS)  # the first that a run has; more is better


class BestTeacher:
    """Remembers the teacher's backbone as it was when it measured best. A checkpoint holds all of it.

    Args:
        starts_trained: the run starts from weights, which may stay the best.
    """

    def __init__(self, starts_trained: bool = False) -> None:
        self.starts_trained = starts_trained
        self.highest: Best | None = None  # of step 0, until a later one was measured
        self.worse: list[int] = []  # the steps of the last checks in a row that found less than at the start
        self.weights: State = {}  # on the CPU; {}: of no step after 0
        self.written = False  # to their file

    @property
    def found(self) -> Best | None:
        return self.highest if self.weights else None

    def consider(self, step: int, values: Mapping[str, float], backbone: nn.Module) -> None:
        """Keep `backbone` if what was measured of it after `step` steps is no worse than of all before."""
        best = self.highest
        measure = best.measure if best else next((name for name in MEASURES if name in values), "")
        score = values.get(measure, math.nan)
        if not math.isfinite(score):
            return
        if step == 0:
            self.highest = Best(step, measure, score, before=score)
            if self.starts_trained:
                self._keep(backbone)
        elif best is None or not self.weights or score >= best.score:  # of equal scores the later: it saw more
            self.highest = Best(step, measure, score, best and best.before)
            self._keep(backbone)
        if step and best is not None and best.before is not None and self.starts_trained:
            self.worse = [] if score >= best.before else [*self.worse, step]

    def _keep(self, backbone: nn.Module) -> None:
        self.weights = {name: value.detach().to("cpu", copy=True) for name, value in backbone.state_dict().items()}
        self.written = False

    def is_worse_for_long(self, total: int) -> bool:
        """Whether for a quarter of the run, of `total` steps, every check (three at least) found less than at the start."""
        return len(self.worse) >= 3 and 4 * (self.worse[-1] - self.worse[0]) >= total

    def save(self, run: Path) -> None:
        """Write it to its file in the directory `run`, if it is not there yet."""
        if self.found is not None and not self.written:
            runs.save_best(run, self.weights, self.found)
            self.written = True

    def state_dict(self) -> dict[str, Any]:
        found = self.highest and self.highest._asdict()
        return {"found": found, "weights": self.weights, "worse": self.worse}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.highest, self.weights = state["found"] and Best(**state["found"]), state["weights"]
        self.worse = state.get("worse", [])
        self.written = False  # what lies there may be damaged, or of a later step
