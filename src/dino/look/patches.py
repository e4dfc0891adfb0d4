"""Features of patches: as colors, on one basis for many images, and which patches of two images correspond."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino.data.normalize import normalize
from dino.data.sources import evenly_spaced
from dino.features.extract import require_finite
from dino.features.neighbors import find_neighbors
from dino.models import Backbone

BASIS_IMAGES, BASIS_PATCHES = 64, 1024  # a basis is fitted to at most so many images, and patches of each


def prepare_image(model: Backbone, image: np.ndarray) -> Tensor:
    """One image [h, w, 3] uint8 as normalized input of `model` [1, channels, h, w], on its device."""
    pixels = torch.from_numpy(np.array(image))[None, None].to(next(model.parameters()).device)
    return normalize(pixels, model.preprocessing)


@torch.no_grad()
def extract_patches(model: Backbone, image: np.ndarray) -> Tensor:
    """Features of the patches of `image` [h, w, 3] uint8 after the last block and norm: float32 [cells, d], on the CPU."""
    return require_finite(model.tokens(prepare_image(model, image))[-1][0, 1:].float().cpu(), model)


class Basis(NamedTuple):
    """Three axes in the space of features, and the range along each that becomes a color."""

    mean: Tensor  # [d]
    axes: Tensor  # [d, 3]
    low: Tensor  # [3]
    high: Tensor

    def colors(self, features: Tensor) -> Tensor:
        """Features [..., d] on the axes, as red, green and blue in [0, 1] [..., 3]."""
        return (((features - self.mean) @ self.axes - self.low) / (self.high - self.low).clamp(min=1e-6)).clamp(0, 1)


def fit_axes(images: Iterable[Tensor]) -> Basis:
    """The three main axes (PCA) of the patches of at most BASIS_IMAGES images, each given by its features [cells, d]."""
    flat = torch.cat([features[evenly_spaced(len(features), BASIS_PATCHES)] for features in images])
    mean = flat.mean(dim=0)
    flat = flat - mean
    axes = torch.linalg.eigh((flat.T @ flat).cpu().double()).eigenvectors[:, -3:].flip(1).to(flat)
    # The sign of an axis is arbitrary; choose it from the data, so that the same data gives the same colors.
    axes = torch.where((flat @ axes).pow(3).sum(dim=0) < 0, -axes, axes)
    return Basis(mean, axes, *(flat @ axes).quantile(flat.new_tensor([0.02, 0.98]), dim=0))


def match_mutual(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of features that are each other's nearest by cosine, most alike first.

    Args:
        a: [m, d]; b: [n, d].

    Returns:
        Positions in `a` and `b` [k, 2], and cosines [k].
    """
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    forth, back = (find_neighbors(x, y, 1)[1][:, 0] for x, y in ((a, b), (b, a)))
    chosen = torch.nonzero(back[forth] == torch.arange(len(a), device=a.device))[:, 0]
    pairs = torch.stack([chosen, forth[chosen]], dim=1)
    cosine, order = (a[pairs[:, 0]] * b[pairs[:, 1]]).sum(dim=1).sort(descending=True, stable=True)
    return pairs[order], cosine
