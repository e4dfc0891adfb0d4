"""k-means by cosine, and how many clusters many rows are put into."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dino.features.neighbors import find_neighbors
from dino.randomness import Stream, open_stream
from dino.terminal import track

ITERATIONS, ROUNDS = 10, 32
SAMPLED = 64  # rows for each center that are enough to find it


def count_cells(rows: int) -> int:
    """Clusters of so many rows: about as many as there are rows in each, with enough rows to find each."""
    return max(1, min(math.isqrt(rows), rows // 39))


def find_centers(sample: Tensor, count: int, seed: int, what: str) -> Tensor:
    """Centers [count, d] of clusters of the rows of `sample` [m, d], all of length 1. A function of these and the seed.

    Args:
        what: label of the progress bar.
    """
    assert 1 <= count <= len(sample)
    centers = _choose_first(sample, count, seed)
    for _ in track(range(ITERATIONS), ITERATIONS, what):
        cells = find_neighbors(sample, centers, 1)[1][:, 0]
        sums = torch.zeros_like(centers).index_add_(0, cells, sample)
        used = torch.bincount(cells, minlength=count) > 0
        centers = torch.where(used[:, None], F.normalize(sums, dim=1), centers)
    return centers


def _choose_first(sample: Tensor, count: int, seed: int) -> Tensor:
    """Rows far from each other, drawn by the square of their distance to those already chosen (Arthur & Vassilvitskii 2007).

    Some are drawn at a time (as Bahmani et al. 2012 do), so that there are ROUNDS passes and not `count`.
    """
    stream, near, chosen = open_stream(Stream.CENTERS, seed), sample.new_full((len(sample),), -1.0), []
    left = count
    while left:
        distance = (1 - near.double()).clamp(min=1e-12)
        if chosen:
            distance[torch.cat(chosen)] = 0
        # The largest keys are a draw without replacement by these weights (Efraimidis & Spirakis 2006).
        keys = torch.from_numpy(stream.random(len(sample))).log() / distance
        new = keys.topk(min(left, -(-count // ROUNDS))).indices
        near = torch.maximum(near, find_neighbors(sample, sample[new], 1)[0][:, 0])
        chosen.append(new)
        left -= len(new)
    return sample[torch.cat(chosen)]
