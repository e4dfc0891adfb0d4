"""Scores of features that need no labels: how many directions they use, and whether they know an image by its crops.

Each is a function of tensors, and more is better. Letters: n images, d features. Last, what of two accuracies may be chance.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dino.variants import feature_spread


@torch.no_grad()
def feature_health(features: Float[Tensor, "n d"]) -> dict[str, float]:
    """`feature_std` is `dino.variants.feature_spread`.

    `effective_rank`: of the centered, L2-normalized features, by their singular values (Roy & Vetterli 2007).
    """
    z = F.normalize(features.float(), dim=1)
    rank = exp_entropy(torch.linalg.svdvals(z - z.mean(dim=0)))
    return {"feature_std": feature_spread(features).item(), "effective_rank": rank.item()}


@torch.no_grad()
def linear_cka(first: Float[Tensor, "n d"], second: Float[Tensor, "n e"]) -> float:
    """How alike two networks see the same images: 1 where features differ by a rotation and a scale only, else less.

    Linear centered kernel alignment (Kornblith et al. 2019, section 3).
    """
    x, y = ((z - z.mean(dim=0)).double() for z in (first, second))
    return ((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()).clamp(min=1e-12)).item()


@torch.no_grad()
def two_crop_retrieval(first: Float[Tensor, "n d"], second: Float[Tensor, "n d"]) -> float:
    """Images whose second crop is more similar (cosine) to their own first crop than to that of any other, in percent.

    The task that contrastive methods train, as a test: chance is 100 / n. Where an image's own crop and others are equally
    similar, its share of them counts, so that features which are all the same score by chance.
    """
    cosines = F.normalize(second.double(), dim=1) @ F.normalize(first.double(), dim=1).T
    best = cosines >= cosines.amax(dim=1, keepdim=True) - 1e-9
    return 100 * (best.diagonal() / best.sum(dim=1)).mean().item()


def exp_entropy(values: Float[Tensor, " m"]) -> Float[Tensor, ""]:
    """exp of the entropy of `values` (none negative) divided by their sum: how many there are, if all are equal."""
    return torch.special.entr(values / values.sum().clamp(min=1e-12)).sum().exp()


def measure_margin(a: float, b: float, count: int) -> float:
    """Two standard errors of the difference of two accuracies on `count` images, in points (Agresti and Caffo 2000)."""
    shares = [(value / 100 * count + 1) / (count + 2) for value in (a, b)]  # else nothing were certain of 0 and 100 %
    return 200 * math.sqrt(sum(p * (1 - p) for p in shares) / (count + 2))
