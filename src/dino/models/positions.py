"""Learned positions of patches for images of other sizes."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

PositionInterpolation = Literal["offset", "size", "antialias"]


def interpolate_positions(
    positions: Float[Tensor, "1 t d"], rows: int, columns: int, how: PositionInterpolation
) -> Float[Tensor, "1 u d"]:
    """Positions of a square grid ([CLS] first) for one of rows x columns, by bicubic interpolation.

    Args:
        how: as the reference ("offset"), as Hugging Face ("size") or as timm ("antialias").
    """
    side = math.isqrt(positions.shape[1] - 1)
    if (rows, columns) == (side, side):
        return positions
    grid = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    # The reference adds 0.1 patch before dividing, and PyTorch then samples at exactly that scale.
    offset = ((rows + 0.1) / side, (columns + 0.1) / side)
    arguments: dict[str, Any] = {
        "offset": {"scale_factor": offset},
        "size": {"size": (rows, columns)},
        "antialias": {"size": (rows, columns), "antialias": True},
    }[how]
    grid = F.interpolate(grid, mode="bicubic", **arguments)
    assert grid.shape[-2:] == (rows, columns)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
