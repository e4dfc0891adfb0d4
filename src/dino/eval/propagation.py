"""Labels carried from frame to frame by the likeness of patches, and how well they outline objects (paper table 5)."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

TEMPERATURE = 0.1
TILE = 12  # rows and columns of patches that are done at a time


def propagate(
    target: Float[Tensor, "h w d"],
    sources: Float[Tensor, "h w m d"],
    labels: Float[Tensor, "h w m c"],
    radius: int,
    topk: int,
) -> Float[Tensor, "h w c"]:
    """Soft labels of a frame: of each patch the mean of the labels of its `topk` most alike patches in `m` other frames.

    Only patches at most `radius` rows and columns away count; weights are exp(cosine / 0.1). A tile of the frame is done
    at a time against what is near it, so that m (tile (tile + 2 radius))^2 numbers are held, never (h w)^2.

    Args:
        target, sources: L2-normalised features.
    """
    result = target.new_empty(*target.shape[:2], labels.shape[-1])
    for i, j in itertools.product(range(0, target.shape[0], TILE), range(0, target.shape[1], TILE)):
        tile, window = zip(
            *(_reach(at, edge, radius) for at, edge in zip((i, j), target.shape, strict=False)), strict=True
        )
        by_row, by_column = (_near(t, w, radius, target) for t, w in zip(tile, window, strict=True))
        near = (by_row[:, None, :, None] * by_column[None, :, None, :]).flatten(2).flatten(0, 1)  # [patches, places]
        weights = (target[tile].flatten(0, 1) @ sources[window].flatten(0, 2).T / TEMPERATURE).exp()
        weights = (weights.unflatten(1, (near.shape[1], -1)) * near[..., None]).flatten(1)
        least = weights.topk(min(topk, weights.shape[1]), dim=1).values[:, -1:]
        weights = weights.where(weights >= least, torch.zeros_like(weights))
        soft = (weights / weights.sum(dim=1, keepdim=True)) @ labels[window].flatten(0, 2)
        result[tile] = soft.unflatten(0, result[tile].shape[:2])
    return result


def _reach(start: int, edge: int, radius: int) -> tuple[slice, slice]:
    """Places of a tile along one axis, and those near any of them."""
    stop = min(start + TILE, edge)
    return slice(start, stop), slice(max(0, start - radius), min(stop + radius, edge))


def _near(tile: slice, window: slice, radius: int, like: Tensor) -> Tensor:
    """1 where a place of the window is near one of the tile, else 0; [tile, window]."""
    places = [torch.arange(part.start, part.stop, device=like.device) for part in (tile, window)]
    return ((places[0][:, None] - places[1]).abs() <= radius).to(like.dtype)


def harden(soft: Float[Tensor, "h w c"], patch_size: int) -> np.ndarray:
    """The class of each pixel, uint8 [h * patch, w * patch]: labels enlarged, each class stretched to [0, 1], the largest."""
    large = F.interpolate(soft.permute(2, 0, 1)[None], scale_factor=patch_size, mode="bilinear", align_corners=False)[0]
    flat = large.flatten(1)
    low = flat.min(dim=1, keepdim=True).values
    span = flat.max(dim=1, keepdim=True).values - low
    stretched = torch.where(flat.amax(dim=1, keepdim=True) > 0, (flat - low) / span, flat)
    return stretched.nan_to_num().view_as(large).argmax(dim=0).to(torch.uint8).cpu().numpy()


def region(found: np.ndarray, truth: np.ndarray) -> float:
    """J: intersection over union of two masks, bool [h, w]; 1 when both are empty."""
    union = np.count_nonzero(found | truth)
    return np.count_nonzero(found & truth) / union if union else 1.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask, bool [h, w], that differ from their right, lower or lower right neighbour."""
    inside = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    here, right, below, diagonal = inside[:-1, :-1], inside[:-1, 1:], inside[1:, :-1], inside[1:, 1:]
    edge = (here ^ right) | (here ^ below)
    # The last row and column look along themselves only.
    edge[:-1, :-1] |= (here ^ diagonal)[:-1, :-1]
    return edge


def contour(found: np.ndarray, truth: np.ndarray) -> float:
    """F: harmonic mean of the shares of either boundary that lies within 0.8 % of the diagonal of the other."""
    reach = int(np.ceil(0.008 * np.hypot(*found.shape)))
    offset = np.arange(-reach, reach + 1)
    disk = (offset[:, None] ** 2 + offset**2 <= reach**2).astype(np.uint8)
    ours, theirs = boundary(found), boundary(truth)
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    precision, recall = (
        np.count_nonzero(a & (cv2.dilate(b.astype(np.uint8), disk) > 0)) / np.count_nonzero(a)
        for a, b in ((ours, theirs), (theirs, ours))
    )
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def mean_recall_decay(values: np.ndarray) -> tuple[float, float, float]:
    """Over the frames of an object: the mean, the share above one half, and the first quarter's mean less the last's."""
    bounds = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    first, last = values[: bounds[1] + 1], values[bounds[3] :]
    return float(values.mean()), float((values > 0.5).mean()), float(first.mean() - last.mean())
