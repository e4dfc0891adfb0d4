"""Attention of [CLS] in the last block, head by head: maps, masks that hold 60 % of it, and finer patches."""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dino.features.extract import require_finite
from dino.models import Backbone
from dino.options.commands import LookOptions
from dino.options.rules import checked

MOST_PATCHES = 2**15  # of one image; the work grows with their square, and for so many a CPU needs minutes


def fit_to_patches(
    image: np.ndarray, size: int, patch_size: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> np.ndarray:
    """Resize `image` [h, w] or [h, w, 3] to a shorter side of `size` pixels, and trim it evenly to whole patches.

    Raises:
        ValueError: the image is smaller than a patch, or would have more than MOST_PATCHES patches.
    """
    assert size >= patch_size
    height, width = image.shape[:2]
    if min(height, width) < patch_size:
        raise ValueError(f"it is {width} x {height} pixels, smaller than one patch of {patch_size}; use a larger one.")
    scale = size / min(height, width)
    height, width = round(height * scale), round(width * scale)
    check_number(height // patch_size * (width // patch_size), height, width)
    resized = np.asarray(Image.fromarray(image).resize((width, height), resample))
    top, left = height % patch_size // 2, width % patch_size // 2
    return resized[top : top + height // patch_size * patch_size, left : left + width // patch_size * patch_size]


def check_number(patches: int, height: int, width: int) -> None:
    """Refuse an image of more than MOST_PATCHES patches."""
    if patches > MOST_PATCHES:
        raise ValueError(
            f"at {width} x {height} pixels it has {patches:,} patches, more than {MOST_PATCHES:,}, which would take very "
            "long; use a smaller --size."
        )


@torch.no_grad()
def map_attention(model: Backbone, images: Tensor) -> Tensor:
    """Attention of [CLS] over the patches in the last block [n, heads, rows, columns]; each head sums to under 1.

    Raises:
        ValueError: the model has no such attention, or it is not finite.
    """
    maps = model.cls_attention(images).unflatten(-1, model.grid(*images.shape[-2:]))
    return require_finite(maps, model)


def mass_mask(attention: Tensor, mass: float = 0.6) -> Tensor:
    """Of each map [..., rows, columns] the fewest patches that together hold the share `mass` of it, bool (Fig. 4)."""
    if not 0 < mass <= 1:
        raise ValueError(f"mass is {mass}; the share of attention to keep lies above 0 and up to 1.")
    flat = attention.flatten(-2)
    values, order = flat.sort(dim=-1)
    below = (values / values.sum(dim=-1, keepdim=True)).cumsum(dim=-1)
    kept = below > 1 - mass
    return torch.zeros_like(kept).scatter(-1, order, kept).view_as(attention)


def jaccard(predicted: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of masks [..., height, width] -> [...]; 0 where both are empty."""
    both = (predicted & truth).flatten(-2).sum(-1)
    either = (predicted | truth).flatten(-2).sum(-1)
    return both / either.clamp(min=1)


def enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [n, heads, rows, columns] at `size` (height, width) in pixels; each patch becomes a rectangle."""
    return F.interpolate(maps.float(), size, mode="nearest")


@checked(LookOptions, "stride")
def finer_patches(model: Backbone, stride: int) -> Backbone:
    """A copy that cuts a patch every `stride` pixels; see `VisionTransformer.overlap_patches`."""
    finer = copy.deepcopy(model)
    finer.overlap_patches(stride)
    return finer
