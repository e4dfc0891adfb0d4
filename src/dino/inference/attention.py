"""Where the model looks: [CLS] attention of the last block per head, its 60 %-mass masks, and patch-feature colours."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dino.models import Backbone


def fit(
    image: np.ndarray, size: int, patch_size: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> np.ndarray:
    """`image` [h, w] or [h, w, 3] with its shorter side at `size` pixels, trimmed evenly to whole patches; the aspect
    ratio stays.

    Raises:
        ValueError: the image is smaller than a patch.
    """
    assert size >= patch_size
    height, width = image.shape[:2]
    if min(height, width) < patch_size:
        raise ValueError(f"it is {width} x {height} pixels, smaller than one patch of {patch_size}; use a larger one.")
    scale = size / min(height, width)
    height, width = round(height * scale), round(width * scale)
    resized = np.asarray(Image.fromarray(image).resize((width, height), resample))
    top, left = height % patch_size // 2, width % patch_size // 2
    return resized[top : top + height // patch_size * patch_size, left : left + width // patch_size * patch_size]


@torch.no_grad()
def cls_attention(model: Backbone, images: Tensor) -> Tensor:
    """Attention of [CLS] over the patches in the last block [n, heads, rows, columns]; each head sums to under 1.

    Raises:
        ValueError: the model has no such attention.
    """
    return model.cls_attention(images).unflatten(-1, model.grid(*images.shape[-2:]))


def mass_mask(attention: Tensor, mass: float = 0.6) -> Tensor:
    """The fewest patches that hold share `mass` of each map's attention [..., rows, columns], bool (paper Fig. 4)."""
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
    """Maps [n, heads, rows, columns] to pixels by repeating each patch."""
    return F.interpolate(maps.float(), size, mode="nearest")


@torch.no_grad()
def pca_colours(model: Backbone, images: Tensor) -> Tensor:
    """Features of the batch's cells on their three main axes, as colours in [0, 1] [n, rows, columns, 3].

    One basis for the batch: like features have like colours across its images.
    """
    patches = model.tokens(images)[-1][:, 1:].float()
    flat = patches.flatten(0, 1)
    flat = flat - flat.mean(dim=0)
    _, _, axes = torch.linalg.svd(flat, full_matrices=False)
    colours = flat @ axes[:3].T
    colours = F.pad(colours, (0, 3 - colours.shape[1]))  # one or two patches have fewer axes
    # An axis has no sign of its own; the same data should give the same colours.
    colours = torch.where(colours.pow(3).sum(dim=0) < 0, -colours, colours)
    low, high = colours.quantile(0.02, dim=0), colours.quantile(0.98, dim=0)
    colours = ((colours - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return colours.view(len(images), *model.grid(*images.shape[-2:]), 3)
