"""Pixels as networks take them: float32, normalized by a mean and a deviation for each channel."""

from __future__ import annotations

import torch
from torch import Tensor

from dino.distributed import send
from dino.models.preprocessing import IMAGENET, LUMA, Preprocessing


def normalize(views: Tensor, wanted: Preprocessing = IMAGENET) -> Tensor:
    """uint8 [v, n, h, w, 3] as the backbone takes it: float32 [m, 3, h, w] (channels last in memory), view by view.

    Where `wanted` has a mean of one channel, the luma of the colors: [m, 1, h, w].
    """
    num_views, num_images, height, width = views.shape[:4]
    if len(wanted.mean) == 1:
        (mean,), (std,) = wanted.mean, wanted.std
        weights = send(torch.tensor([w / (255 * std) for w in LUMA]), views.device)
        return (views.reshape(-1, 3).float() @ weights).view(-1, 1, height, width) - mean / std
    # In rows of w * 3 numbers, because operations on pixels of 3 are slow.
    scale = send(torch.tensor([1 / (255 * s) for s in wanted.std]).repeat(width), views.device)
    shift = torch.tensor([-m / s for m, s in zip(wanted.mean, wanted.std, strict=True)]).repeat(width)
    rows = views.reshape(-1, width * 3).float().mul_(scale).add_(send(shift, views.device))
    return rows.view(num_views * num_images, height, width, 3).permute(0, 3, 1, 2)
