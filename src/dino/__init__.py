"""DINO: self-supervised pre-training of vision models. Names are resolved when first used; importing loads nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dino.version import __version__

if TYPE_CHECKING:
    from dino.eval.evaluate import evaluate
    from dino.exports.export import export
    from dino.features.embed import embed
    from dino.features.search import duplicates, outliers, search
    from dino.features.sklearn import DinoFeatures
    from dino.look.attention import finer_patches
    from dino.look.pictures import attention_maps, match_patches, pca_colors, video_frames
    from dino.models import create
    from dino.run import train
    from dino.weights import load

__all__ = [
    "DinoFeatures",
    "__version__",
    "attention_maps",
    "create",
    "duplicates",
    "embed",
    "evaluate",
    "export",
    "finer_patches",
]
__all__ += ["load", "match_patches", "outliers", "pca_colors", "search", "train", "video_frames"]

_HOME = {
    "DinoFeatures": "dino.features.sklearn",
    "attention_maps": "dino.look.pictures",
    "create": "dino.models",
    "duplicates": "dino.features.search",
    "embed": "dino.features.embed",
    "evaluate": "dino.eval.evaluate",
    "export": "dino.exports.export",
    "finer_patches": "dino.look.attention",
    "load": "dino.weights",
    "match_patches": "dino.look.pictures",
    "outliers": "dino.features.search",
    "pca_colors": "dino.look.pictures",
    "search": "dino.features.search",
    "train": "dino.run",
    "video_frames": "dino.look.pictures",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dino' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
