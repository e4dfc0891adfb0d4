"""Backbones and the projection head: plain PyTorch, free of the rest of the package.

Whatever uses a backbone may ask only for what `Backbone` names.
"""

import difflib
from typing import Any, Protocol

from torch import Tensor

from dino.models.head import Head
from dino.models.vit import SIZES, VisionTransformer

__all__ = ["SIZES", "Backbone", "Head", "VisionTransformer", "create"]


class Backbone(Protocol):
    """What the method, the evaluations and the pictures may ask of a backbone. Images are normalised, NCHW."""

    embed_dim: int
    patch_size: int

    def __call__(self, images: Tensor) -> Tensor: ...  # [n, embed_dim]
    def tokens(self, images: Tensor, layers: int = 1) -> list[Tensor]: ...  # normed [n, 1 + patches, embed_dim]
    def attention(self, images: Tensor) -> Tensor: ...  # [n, heads, 1 + patches, 1 + patches]


def create(
    arch: str,
    patch_size: int = 16,
    image_size: int = 224,
    width: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    **options: Any,
) -> VisionTransformer:
    """A backbone by name with fresh weights. `width`, `depth` and `num_heads` override the architecture's own.

    Raises:
        ValueError: an unknown name, or sizes that do not divide.
    """
    if arch not in SIZES:
        near = difflib.get_close_matches(arch, SIZES, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown architecture '{arch}'; known are {', '.join(SIZES)}.{hint}")
    own_width, own_depth, own_heads = SIZES[arch]
    return VisionTransformer(
        image_size=image_size,
        patch_size=patch_size,
        dim=width or own_width,
        depth=depth or own_depth,
        num_heads=num_heads or own_heads,
        **options,
    )
