"""What a run writes beside its checkpoints: `metrics.jsonl`, TensorBoard events, and the list of unreadable images."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class MetricsLog:
    """Metrics by step: one JSON object to a line of `metrics.jsonl`, and the same numbers as TensorBoard events.

    A run that resumes after `first_step` first drops the later lines, and in the end has the file of a run that was never
    interrupted.
    """

    def __init__(self, folder: Path, first_step: int, tensorboard: bool):
        self.path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] <= first_step]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 - lives as long as the run
        # Events of steps beyond the checkpoint are marked as superseded.
        self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1) if tensorboard else None

    def write(self, step: int, values: dict[str, float]) -> None:
        values = {name: value for name, value in values.items() if math.isfinite(value)}  # JSON has no other numbers
        self.file.write(json.dumps({"step": step} | values) + "\n")
        if self.events is not None:
            for name, value in values.items():
                self.events.add_scalar(name, value, step)

    def close(self) -> None:
        self.file.close()
        if self.events is not None:
            self.events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; [] if there is none. A last line that a kill cut short is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


class Quarantine:
    """Images that could not be read: `quarantine.jsonl` names each once, with the reason."""

    def __init__(self, path: Path, total: int, max_fraction: float):
        self.path, self.total, self.max_fraction = path, total, max_fraction
        self.names = {line["image"] for line in read_metrics(path)}

    def add(self, bad: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Write down the names and reasons that are new, and return them."""
        fresh = [(name, reason) for name, reason in dict(bad).items() if name not in self.names]
        if fresh:
            with open(self.path, "a") as file:
                file.writelines(json.dumps({"image": name, "reason": reason}) + "\n" for name, reason in fresh)
            self.names.update(name for name, _ in fresh)
        return fresh

    def too_many(self) -> bool:
        """Whether the share of unreadable images is above the limit."""
        return len(self.names) > self.max_fraction * self.total
