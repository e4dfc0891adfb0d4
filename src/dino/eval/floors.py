"""What needs no network: raw pixels and color histograms as features, which a model has to beat."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from dino.data.normalize import normalize
from dino.data.sources import Source
from dino.features.extract import EvaluationViews, Features
from dino.terminal import track

COLORS = 8**3  # bins of a color histogram
LARGEST = 64  # edge of the images whose pixels are compared
AT_ONCE = 256  # images that are read at once
BANK, QUERIES = 5000, 1000  # images at most, so that a check takes much less time than an epoch


def read_views(source: Source, positions: np.ndarray, edge: int, progress: str | None = None) -> Features:
    """Evaluation views of the images at these positions, uint8 [m, edge, edge, 3], if they can be read.

    Args:
        progress: label of a progress bar; None: no bar.
    """
    views = EvaluationViews(source, positions.tolist(), edge, AT_ONCE, threads=torch.get_num_threads())
    parts = (views[item] for item in range(len(views)))
    read = [*(track(parts, len(views), progress) if progress else parts)]
    found = [Features(runs[0][0], np.array(at, np.int64), bad) for runs, at, bad in read if runs]
    bad = [entry for runs, _, bad in read if not runs for entry in bad]
    together = Features.concatenate(found, edge, edge, 3)
    return together._replace(values=together.values.to(torch.uint8), bad=together.bad + bad)


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


def describe_plainly(edge: int) -> dict[str, Callable[[Features], Features]]:
    """What makes features of views of `edge` pixels without a network, by its name."""
    return {f"raw {edge}x{edge} pixels": flatten_pixels, "color histograms": count_colors}
