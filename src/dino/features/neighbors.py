"""TODO."""

from __future__ import annotations

import torch
from torch import Tensor

RUN = 64  # columns whose maximum is looked at first


def largest(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`rows.topk(k, dim=1)` of rows [n, m], faster where m is large.

    The k largest lie in the k runs of columns whose maxima are largest, so only those runs are searched.
    """
    m = rows.shape[1] // RUN * RUN
    if m < 4 * k * RUN:
        values, columns = rows.topk(k, dim=1)
        return values, columns
    runs = rows[:, :m].unflatten(1, (-1, RUN))
    best = runs.amax(dim=2).topk(k, dim=1, sorted=False).indices  # [n, k]
    searched = torch.cat([runs.gather(1, best[..., None].expand(-1, -1, RUN)).flatten(1), rows[:, m:]], dim=1)
    values, where = searched.topk(k, dim=1)
    in_run = best.gather(1, (where // RUN).clamp(max=k - 1)) * RUN + where % RUN
    return values, torch.where(where < k * RUN, in_run, where - k * RUN + m)


def vote(similarity: Tensor, labels: Tensor, num_classes: int, temp: float = 0.07) -> Tensor:
    """What the k nearest of n queries vote for: [n, classes] from their cosines and labels [n, k] each."""
    return similarity.new_zeros(len(labels), num_classes).scatter_add_(1, labels, (similarity / temp).exp())
