"""DINO: self-supervised pre-training of vision models. Names are resolved when first used; importing loads nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dino.version import __version__ as __version__

if TYPE_CHECKING:
    from dino.eval.evaluate import evaluate as evaluate
    from dino.exports.export import export as export
    from dino.features.copies import duplicates as duplicates
    from dino.features.embed import embed as embed
    from dino.features.search import outliers as outliers
    from dino.features.search import search as search
    from dino.features.select import select as select
    from dino.features.sklearn import DinoFeatures as DinoFeatures
    from dino.look.attention import finer_patches as finer_patches
    from dino.look.pictures import attention_maps as attention_maps
    from dino.look.pictures import match_patches as match_patches
    from dino.look.pictures import pca_colors as pca_colors
    from dino.look.video import video_frames as video_frames
    from dino.models import create as create
    from dino.run import train as train
    from dino.weights import load as load

_NAMES = {
    "dino.eval.evaluate": ("evaluate",),
    "dino.exports.export": ("export",),
    "dino.features.copies": ("duplicates",),
    "dino.features.embed": ("embed",),
    "dino.features.search": ("outliers", "search"),
    "dino.features.select": ("select",),
    "dino.features.sklearn": ("DinoFeatures",),
    "dino.look.attention": ("finer_patches",),
    "dino.look.pictures": ("attention_maps", "match_patches", "pca_colors"),
    "dino.look.video": ("video_frames",),
    "dino.models": ("create",),
    "dino.run": ("train",),
    "dino.weights": ("load",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dino' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
