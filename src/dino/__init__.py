"""DINO: self-supervised pre-training of vision models. Names are resolved when first used; importing loads nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino.api import export, train
    from dino.eval.judge import evaluate
    from dino.models import create
    from dino.models.weights import load

__version__ = "0.1.0"
__all__ = ["create", "evaluate", "export", "load", "train"]

_HOME = {
    "create": "dino.models",
    "evaluate": "dino.eval.judge",
    "export": "dino.api",
    "load": "dino.models.weights",
    "train": "dino.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dino' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
