"""Fewer images of many, for training: without near-copies, and spread evenly over what there is.

Near-copies are removed within clusters (SemDeDup, Abbas et al. 2023). Of the others, equally many are drawn from each cluster
of clusters, and so from the clusters within it (hierarchical k-means, Vo et al. 2024): what is rare stays, and what is
frequent is thinned out. Features stay on the disk; memory holds 25 bytes for each image.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dino import files
from dino.data.open import name_in_list
from dino.data.sources import Source, evenly_spaced
from dino.features.cluster import SAMPLED, count_cells, find_centers
from dino.features.copies import ALONE_RATIO, choose_threshold
from dino.features.embedding import AnyEmbedding, Embedding, Mapped, Rows, open_whole
from dino.features.neighbors import find_neighbors
from dino.features.search import judge_features
from dino.options.commands import SelectOptions
from dino.options.rules import checked
from dino.randomness import Stream, open_stream
from dino.terminal import track

BLOCK = 2**17  # rows at a time
COMPARED = 2**10  # rows of a cluster that are compared at a time
IN_GROUP, FEWEST_GROUPS = 4, 16  # clusters of a group, on average; groups of the highest level, at most


class Selected(NamedTuple):
    rows: np.ndarray  # int64 [m], in order
    copies: int  # near-copies that were removed
    threshold: float  # cosine from which they were
    all_counts: np.ndarray  # int64 [groups], images of each group of the highest level
    kept_counts: np.ndarray  # int64 [groups], those selected


@checked(SelectOptions, "embedding", "keep", "threshold", "seed")
def select(embedding: AnyEmbedding, keep: int, threshold: float | None = None, seed: int = 0) -> Selected:
    """Choose `keep` rows of an embedding, or all that are left without near-copies.

    Args:
        threshold: cosine from which two rows are near-copies. None: their distance is at most ALONE_RATIO of that of a
            typical pair.
        seed: of the first centers of clusters, and of the draw from each.

    Raises:
        ValueError: the model cannot tell the images apart, and no threshold is given.
    """
    rows = embedding if isinstance(embedding, Embedding | Mapped) else Mapped(open_whole(embedding))
    if threshold is None and (fault := judge_features(rows)):
        raise ValueError(f"no images are selected: {fault} Or say with --threshold which cosine makes two near-copies.")
    least = choose_threshold(rows, ALONE_RATIO) if threshold is None else threshold
    cells, centers = _find_cells(rows, seed)
    left = _remove_copies(rows, cells, len(centers), least)
    counts = np.array([*map(len, left)])
    parents = _group(centers, seed)
    quotas = _share_out(keep, counts, parents)
    drawn = [_draw(members, quota, seed, cell) for cell, (members, quota) in enumerate(zip(left, quotas, strict=True))]
    top = np.arange(len(centers))  # of each cell its group of the highest level
    for level in parents:
        top = level[top]
    all_counts = np.bincount(top[cells[:, 0]], minlength=int(top.max()) + 1)
    kept = np.sort(np.concatenate(drawn))
    kept_counts = np.bincount(top[cells[kept, 0]], minlength=len(all_counts))
    return Selected(kept, len(rows) - int(counts.sum()), least, all_counts, kept_counts)


def _find_cells(rows: Rows, seed: int) -> tuple[np.ndarray, Tensor]:
    """The cluster of each row and the one that is nearest after it (itself, if it is the only one), int32 [n, 2], and the
    centers [k, d]."""
    count = count_cells(len(rows))
    centers = find_centers(rows.take(evenly_spaced(len(rows), SAMPLED * count)), count, seed, "clusters")
    cells, start = np.empty((len(rows), 2), np.int32), 0
    for block in track(rows.iterate(BLOCK), -(-len(rows) // BLOCK), "cluster of each image"):
        cells[start : start + len(block)] = find_neighbors(block, centers, 2)[1].numpy()
        start += len(block)
    return cells, centers


# --- near-copies -------------------------------------------------------------------------------------------------------


def _remove_copies(rows: Rows, cells: np.ndarray, count: int, least: float) -> list[np.ndarray]:
    """The rows of each cluster, without those that are near-copies of another that stays.

    They are compared with those of their own cluster, and of the clusters before it with those to which it is the second
    nearest: else copies on both sides of a border would stay.
    """
    order, visits = (np.argsort(column, kind="stable") for column in cells.T)
    bounds, visited = (
        np.searchsorted(column, np.arange(count + 1), sorter=sorter)
        for column, sorter in zip(cells.T, (order, visits), strict=True)
    )
    stays, left = np.zeros(len(rows), bool), []
    for cell in track(range(count), count, "near-copies"):
        others = visits[visited[cell] : visited[cell + 1]]
        others = others[stays[others] & (cells[others, 0] != cell)]
        left.append(_keep_first(rows, order[bounds[cell] : bounds[cell + 1]], rows.take(others), least))
        stays[left[-1]] = True
    return left


def _keep_first(rows: Rows, members: np.ndarray, kept: Tensor, least: float) -> np.ndarray:
    """Of sorted `members` those whose cosine with all of `kept` [m, d], and all that stay before them, is below `least`."""
    left = [np.zeros(0, np.int64)]
    for start in range(0, len(members), COMPARED):
        part = members[start : start + COMPARED]
        values = rows.take(part)
        free = (
            find_neighbors(values, kept, 1)[0][:, 0] < least if len(kept) else torch.ones(len(part), dtype=torch.bool)
        )
        part, values = part[free.numpy()], values[free]
        alike = torch.triu(values @ values.T >= least, diagonal=1)
        chosen = torch.ones(len(part), dtype=torch.bool)
        for i in torch.nonzero(alike.any(dim=1))[:, 0].tolist():
            if chosen[i]:
                chosen &= ~alike[i]
        kept = torch.cat([kept, values[chosen]])
        left.append(part[chosen.numpy()])
    return np.concatenate(left)


# --- how many of each --------------------------------------------------------------------------------------------------


def _group(centers: Tensor, seed: int) -> list[np.ndarray]:
    """The group of each cluster, the group of each of these groups, and so on, up to few.

    Clusters are many where images are dense. Groups are made of centers, each of which counts once, so there are fewer such
    groups in each level.
    """
    parents = []
    while len(centers) > FEWEST_GROUPS:
        above = find_centers(centers, len(centers) // IN_GROUP, seed, "clusters of clusters")
        parents.append(find_neighbors(centers, above, 1)[1][:, 0].numpy())
        centers = above
    return parents


def _share_out(keep: int, counts: np.ndarray, parents: Sequence[np.ndarray]) -> np.ndarray:
    """How many of the `counts` images of each cluster are kept: of each group as many, and so in the groups within it."""
    sizes = [counts]
    for level in parents:
        sizes.append(np.bincount(level, weights=sizes[-1]).astype(np.int64))
    quotas = divide(keep, sizes.pop())
    for level in reversed(parents):
        below, shares = sizes.pop(), quotas
        quotas = np.zeros_like(below)
        for group, share in enumerate(shares.tolist()):
            quotas[level == group] = divide(share, below[level == group])
    return quotas


def divide(total: int, most: np.ndarray) -> np.ndarray:
    """`total`, or the sum of `most` where that is less, in parts that differ by 1 at most but where `most` is the smaller."""
    parts, left = np.zeros_like(most), min(total, int(most.sum()))
    while left:
        (open_parts,) = np.nonzero(parts < most)
        each = left // len(open_parts)
        if each:
            added = np.minimum(most[open_parts] - parts[open_parts], each)
        else:
            open_parts, added = open_parts[:left], np.ones(left, np.int64)
        parts[open_parts] += added
        left -= int(added.sum())
    return parts


def _draw(members: np.ndarray, count: int, seed: int, cell: int) -> np.ndarray:
    words = open_stream(Stream.SELECTED, seed, part=cell).bit_generator.random_raw(len(members))
    return members[np.argsort(words, kind="stable")[:count]]


# --- the list ----------------------------------------------------------------------------------------------------------


def write_list(rows: Rows, chosen: Sequence[int] | np.ndarray, images: Source, out: Path) -> None:
    """Write where the chosen images lie, a line each, as `--data` takes it.

    Raises:
        ValueError: the images are no files, or a name holds what no line can.
    """
    with files.replacing(out) as temporary, temporary.open("w", encoding="utf-8", errors="surrogateescape") as file:
        for row in track(chosen, len(chosen), "list"):
            file.write(name_in_list(images, rows.positions[row]) + os.linesep)
