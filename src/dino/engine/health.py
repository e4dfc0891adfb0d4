"""Scores of features that need no labels: how many directions they use, and whether they know an image by its crops.

Each is a function of tensors, and more is better. Letters: n images, q augmented crops of each, d features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dino.variants import feature_spread

LIDAR_FLOOR = 1e-4  # delta of LiDAR: keeps directions in which no crops differ from counting without bound


@torch.no_grad()
def feature_health(features: Float[Tensor, "n d"]) -> dict[str, float]:
    """`feature_std` is `dino.variants.feature_spread`.

    `effective_rank`: of the centered, L2-normalized features, by their singular values (Roy & Vetterli 2007).
    """
    z = F.normalize(features.float(), dim=1)
    rank = exp_entropy(torch.linalg.svdvals(z - z.mean(dim=0)))
    return {"feature_std": feature_spread(features).item(), "effective_rank": rank.item()}


@torch.no_grad()
def rankme(features: Float[Tensor, "n d"]) -> float:
    """exp of the entropy of s / sum(s), for the singular values s of the features as they are: from 1 to min(n, d).

    RankMe (Garrido et al. 2023, Eq. 1 and 2).
    """
    return exp_entropy(torch.linalg.svdvals(features.double())).item()


@torch.no_grad()
def lidar(crops: Float[Tensor, "n q d"]) -> float:
    """exp of the entropy of v / sum(v), for the eigenvalues v of W^-1/2 B W^-1/2: from 1 to min(n - 1, d).

    B is the covariance of the images' means over their crops, and W = delta I + the mean covariance of an image's crops
    about its mean. A direction counts as far as it tells images apart more than it tells crops of one image apart. LiDAR
    (Thilak et al. 2023, section 4), without whose small constant within the logarithm 0 log 0 is 0.
    """
    crops = crops.double()
    means = crops.mean(dim=1)
    between = (means - means.mean(dim=0)) / len(means) ** 0.5
    within = (crops - means[:, None]).flatten(0, 1) / (crops.shape[0] * crops.shape[1]) ** 0.5
    covariance = within.T @ within + LIDAR_FLOOR * torch.eye(crops.shape[2], dtype=crops.dtype, device=crops.device)
    values, axes = torch.linalg.eigh(covariance)
    # Eigenvalues of a matrix times its transpose are squares of its singular values.
    return exp_entropy(torch.linalg.svdvals(between @ (axes / values.sqrt())).square()).item()


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
