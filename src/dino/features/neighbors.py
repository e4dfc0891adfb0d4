"""The rows of a matrix that are nearest to each query, exactly, and the class they vote for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

MOST_NUMBERS = 2**26  # of float32 that similarities or scores may take at once: 256 MB
RUN = 64  # columns; of each run the maximum is looked at first


def split_rows(count: int, width: int) -> Iterator[slice]:
    """Slices of `count` rows. A slice with `width` numbers in each row holds at most MOST_NUMBERS, or is one row."""
    step = max(1, MOST_NUMBERS // max(1, width))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


@torch.no_grad()
def find_neighbors(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k rows of `bank` [m, d] whose product with a query is largest, for each of `queries` [q, d].

    Returns:
        Products (cosines, if all rows have length 1) and positions in the bank, [q, min(k, m)] each, the largest first.
    """
    k, parts = min(k, len(bank)), list(split_rows(len(queries), len(bank)))
    products = queries.new_empty(len(queries), k)
    positions = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    # All parts use the same memory: fresh pages would cost as much time as the search.
    memory = queries.new_empty(parts[0].stop if parts else 0, len(bank))
    for part in parts:
        similarity = torch.mm(queries[part], bank.T, out=memory[: part.stop - part.start])
        products[part], positions[part] = find_largest(similarity, k)
    return products, positions


def find_largest(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`rows.topk(k, dim=1)` of rows [n, m], faster where m is large. Which of equal values are taken may differ.

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


def vote(cosines: Tensor, labels: Tensor, num_classes: int, temp: float = 0.07) -> Tensor:
    """The votes [n, classes] of the k neighbors of n queries, exp(cosine / temp) each, from cosines and labels [n, k].

    A class that none of the neighbors has gets exactly 0.
    """
    return cosines.new_zeros(len(labels), num_classes).scatter_add_(1, labels, (cosines / temp).exp())
