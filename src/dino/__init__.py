"""DINO: self-supervised pre-training of vision models. Names are resolved when first used; importing loads nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino.api import train
    from dino.eval.judge import evaluate
    from dino.exchange import export
    from dino.inference.attention import finer_patches
    from dino.inference.embed import embed
    from dino.inference.search import duplicates, outliers, search
    from dino.inference.transformer import DinoFeatures
    from dino.models import create
    from dino.models.weights import load
    from dino.report.pictures import attention_maps, match_patches, pca_colours, video_frames

__version__ = "0.1.0"
__all__ = ["DinoFeatures", "attention_maps", "create", "duplicates", "embed", "evaluate", "export", "finer_patches"]
__all__ += ["load", "match_patches", "outliers", "pca_colours", "search", "train", "video_frames"]

_HOME = {
    "DinoFeatures": "dino.inference.transformer",
    "attention_maps": "dino.report.pictures",
    "create": "dino.models",
    "duplicates": "dino.inference.search",
    "embed": "dino.inference.embed",
    "evaluate": "dino.eval.judge",
    "export": "dino.exchange",
    "finer_patches": "dino.inference.attention",
    "load": "dino.models.weights",
    "match_patches": "dino.report.pictures",
    "outliers": "dino.inference.search",
    "pca_colours": "dino.report.pictures",
    "search": "dino.inference.search",
    "train": "dino.api",
    "video_frames": "dino.report.pictures",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dino' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
