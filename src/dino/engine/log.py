"""What a run writes beside its checkpoints, line by line: metrics, unreadable images, evaluations."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dino import files
from dino.engine.trackers import Guarded

EVALUATIONS = "evaluations.jsonl"  # in a run directory
_TABLES = ("options", "figures", "floors", "images")  # of its lines


class MetricsLog:
    """Metrics by step: one JSON object to a line of `metrics.jsonl`, and the same numbers to `trackers`.

    A run that resumes after `first_step` first drops the later lines, and in the end has the file of a run that was never
    interrupted.
    """

    def __init__(self, folder: Path, first_step: int, trackers: Sequence[Guarded] = ()):
        self.path = folder / "metrics.jsonl"
        # A run that starts measures its untrained network, also where it was killed before the first checkpoint.
        kept = [line for line in read_metrics(self.path) if 0 < first_step >= line["step"]]
        files.write(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 - lives as long as the run
        self.trackers = trackers

    def write(self, step: int, values: dict[str, float]) -> None:
        values = {name: value for name, value in values.items() if math.isfinite(value)}  # JSON has no other numbers
        self.file.write(json.dumps({"step": step} | values) + "\n")
        for tracker in self.trackers:
            tracker.write(step, values)

    def close(self) -> None:
        for file in (self.file, *self.trackers):
            with contextlib.suppress(OSError):  # each write was flushed: an error has been told already
                file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; [] if there is none. A step is a whole number, and all values are numbers."""
    lines = _read_lines(path, {"step"}, lambda value: isinstance(value, int | float) and -1e300 < value < 1e300)
    return [line for line in lines if isinstance(line["step"], int)]


def read_quarantine(path: Path) -> list[dict[str, str]]:
    """The `image` and the `reason` of each line; [] if there is no such file."""
    return _read_lines(path, {"image", "reason"}, lambda value: isinstance(value, str))


def record_evaluation(run: Path, line: dict[str, Any]) -> None:
    """Add what `dino eval` found of a run to its `evaluations.jsonl`; raises OSError where that cannot be written."""
    with open(run / EVALUATIONS, "a") as file:
        file.write(json.dumps(line) + "\n")


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """The lines of `record_evaluation`, the oldest first; [] if there is no such file."""
    names = {"date", "step", "teacher", "options", "evaluation", "figures", "floors", "images"}
    lines = _read_lines(path, names, lambda value: isinstance(value, str | int | dict | None))
    return [line for line in lines if all(isinstance(line[name], dict) for name in _TABLES) and _are_numbers(line)]


def _are_numbers(line: dict[str, Any]) -> bool:
    """Whether all figures and floors are numbers."""
    floors = line["floors"].values()
    tables = [line["figures"], line["images"], *floors]
    return all(isinstance(x, dict) and all(isinstance(n, int | float) for n in x.values()) for x in tables)


def _read_lines(path: Path, names: set[str], accepts: Callable[[Any], bool]) -> list[dict[str, Any]]:
    """Lines that have `names` and only values that are accepted. Others are left out: a kill cuts lines short."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and line.keys() >= names and all(map(accepts, line.values())):
                lines.append(line)
    return lines
