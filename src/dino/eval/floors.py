"""What needs no network: raw pixels and color histograms as features, which a model has to beat."""

from __future__ import annotations

import numpy as np
import torch

from dino.data.normalize import normalize
from dino.data.sources import Source
from dino.features.extract import EvaluationViews, Features

COLORS = 8**3  # bins of a color histogram
LARGEST = 64  # edge of the images whose pixels are compared
BANK, QUERIES = 5000, 1000  # images at most, so that a check takes much less time than an epoch


def read_views(source: Source, positions: np.ndarray, edge: int) -> Features:
    """Evaluation views of the images at these positions, uint8 [m, edge, edge, 3], if they can be read."""
    views = EvaluationViews(source, positions.tolist(), edge, len(positions), threads=torch.get_num_threads())
    runs, indices, bad = views[0]
    values = runs[0][0] if runs else torch.zeros(0, edge, edge, 3, dtype=torch.uint8)
    return Features(values, np.array(indices, np.int64), bad)


def flatten_pixels(views: Features) -> Features:
    """Normalized pixels as features [m, 3 * edge * edge]."""
    return views._replace(values=normalize(views.values[None]).flatten(1))


def count_colors(views: Features) -> Features:
    """Color histograms as features [m, 512] of length one: roots of the shares of 8 x 8 x 8 colors, so that a product of two
    is their Bhattacharyya coefficient."""
    red, green, blue = (views.values.flatten(1, 2) // 32).long().unbind(dim=-1)
    codes = 64 * red + 8 * green + blue
    counts = torch.zeros(len(codes), COLORS).scatter_add_(1, codes, torch.ones(codes.shape))
    return views._replace(values=(counts / max(1, codes.shape[1])).sqrt())
