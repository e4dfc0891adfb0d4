"""Pixels as networks take them: float32, normalized by the mean and deviations of ImageNet."""

from __future__ import annotations

import torch
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)  # RGB of ImageNet, white = 1
STD = (0.229, 0.224, 0.225)
LUMA = (0.299, 0.587, 0.114)  # weights of the colors (ITU-R BT.601)


def normalize(views: Tensor, channels: int = 3) -> Tensor:
    """uint8 [v, n, h, w, 3] as the backbone takes it: float32 [m, 3, h, w] (channels last in memory), view by view.

    With one channel, the luma of the colors: [m, 1, h, w], scaled by the luma of ImageNet's mean and deviations.
    """
    num_views, num_images, height, width = views.shape[:4]
    if channels == 1:
        mean, std = (sum(w * x for w, x in zip(LUMA, of, strict=True)) for of in (MEAN, STD))
        weights = torch.tensor([w / (255 * std) for w in LUMA]).to(views.device, non_blocking=True)
        return (views.reshape(-1, 3).float() @ weights).view(-1, 1, height, width) - mean / std
    assert channels == 3
    # In rows of w * 3 numbers, because operations on pixels of 3 are slow.
    scale = torch.tensor([1 / (255 * s) for s in STD]).repeat(width).to(views.device, non_blocking=True)
    shift = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)]).repeat(width)
    rows = views.reshape(-1, width * 3).float().mul_(scale).add_(shift.to(views.device, non_blocking=True))
    return rows.view(num_views * num_images, height, width, 3).permute(0, 3, 1, 2)
