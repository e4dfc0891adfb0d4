"""Interpolation of positions for graphs whose numbers of rows and columns are symbols.

PyTorch's own interpolation would fix these numbers while a model is exported.
"""

import math

import torch
from torch import Tensor

from dino.data.device_render import compute_cubic
from dino.models.positions import PositionInterpolation


def interpolate_symbolically(positions: Tensor, rows: int, columns: int, how: PositionInterpolation) -> Tensor:
    """`interpolate_positions` within 1e-5 as one graph for every size: products with two matrices of bicubic weights."""
    side = math.isqrt(positions.shape[1] - 1)
    sizes = torch.stack([torch.scalar_tensor(rows), torch.scalar_tensor(columns)])
    excess = 0.1 * (sizes != side).any() if how == "offset" else 0.0
    steps = side / (sizes + excess)  # a step of 1 leaves the grid as it is
    along_rows, along_columns = (
        _bicubic(size, side, step, how == "antialias").to(positions)
        for size, step in zip((rows, columns), steps.unbind(), strict=True)
    )
    grid = torch.einsum("ri,ijd->rjd", along_rows, positions[0, 1:].unflatten(0, (side, side)))
    grid = torch.einsum("cj,rjd->rcd", along_columns, grid)
    return torch.cat([positions[:, :1], grid.flatten(0, 1)[None]], dim=1)


def _bicubic(size: int, side: int, step: Tensor, antialias: bool) -> Tensor:
    """Weights [size, side] with which `side` cells make `size`, as PyTorch's; `step` cells lie between two targets."""
    cells, targets = torch.arange(side) + 0.5, (torch.arange(size)[:, None] + 0.5) * step
    if antialias:  # the kernel is as wide as a step, and cut off at the border
        weights = compute_cubic((cells - targets) / step.clamp(min=1), -0.5)
        return weights / weights.sum(dim=1, keepdim=True)
    taps = (targets - 0.5).floor() + torch.arange(-1, 3)
    reached = taps.clamp(0, side - 1)[..., None] == cells - 0.5  # the border is repeated
    return (compute_cubic(targets - 0.5 - taps, -0.75)[..., None] * reached).sum(dim=1)
