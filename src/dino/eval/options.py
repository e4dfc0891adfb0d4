"""Options of the evaluations. The text under a field is its help; nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What every evaluation takes."""

    model: Positional[str]
    """A run directory, a weight file, or a model's name (dino models)."""
    size: int | None = None
    """Edge of the evaluation view, pixels. None: what the protocol or the model was made for."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. Under torchrun the work is shared, with the same result."""
    json: str | None = None
    """File for the result. None: eval/NAME.json in a run's directory, none for other models."""


@dataclass(frozen=True, kw_only=True)
class LabelledOptions(EvalOptions):
    """For evaluations that classify."""

    data: str
    """Labelled images: a folder with train/ and val/, or a folder of classes (a tenth of it becomes the test set)."""
    val: str | None = None
    """Labelled test images, when they lie elsewhere."""


@dataclass(frozen=True, kw_only=True)
class KnnOptions(LabelledOptions):
    k: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours."""
    temp: float = 0.07
    """Temperature of the votes exp(cosine / temp)."""

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1:
            raise ValueError(f"k is {self.k}; ask for numbers of neighbours of at least 1.")
        if self.temp <= 0:
            raise ValueError(f"temp is {self.temp}; a temperature must be above 0.")
