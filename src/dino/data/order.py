"""Which images a step sees: every image once an epoch, by (seed, epoch) alone, whatever their number.

Up to `MOST_PERMUTED` images, an epoch is a permutation of all. Of more, none is ever in memory: blocks of neighbors (a
shard, for example) come in random order, as many as hold about `WINDOW` images make a window, and each window is permuted.
So a worker needs some megabytes for a billion images, and reads few shards at a time.

Sources with weights are visited in that proportion: one goes through its own epochs faster than another.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from dino.data.sources import Source, find_bounds, find_parts
from dino.randomness import Stream, open_stream

MOST_PERMUTED, WINDOW = 2**24, 2**20
_BLOCK = 2**10  # neighbors that stay together where there are no shards
# Permutations of an epoch are numbered: those of each source from a multiple of the first, those of all from the second.
_PART, _MIXTURE = 2**32, 2**60


@functools.lru_cache(maxsize=2)
def order_epoch(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """The order in which epoch `epoch` visits the images: a permutation of 0..num_images-1."""
    return _permute(seed, epoch, 0, num_images)


def _permute(seed: int, epoch: int, number: int, count: int) -> np.ndarray:
    return open_stream(Stream.ORDER, seed, epoch, number).permutation(count)


class Order:
    """The order of a source's images in every epoch.

    Args:
        most: images of which all are permuted; of more, windows of about `window` images.
    """

    def __init__(self, source: Source, seed: int, most: int = MOST_PERMUTED, window: int = WINDOW):
        parts, total = find_parts(source), len(source)
        edges = np.array([0, total]) if parts is None else parts.bounds
        bounds = edges if (found := find_bounds(source)) is None else found
        self.parts = [
            _Part(seed, number * _PART, _cut(bounds, first, end, window), most, window)
            for number, (first, end) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
        ]
        self.mixture = None if parts is None else _Mixture(seed, self.parts, parts.weights, most, window)

    def visit(self, epoch: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Places `first` to `last` - 1 of an epoch: positions in the source, and numbers that differ from place to place.

        Of an image that comes twice in an epoch, which weights can make happen, only the numbers differ.
        """
        if self.mixture is not None:
            both = self.mixture.visit(epoch, first, last)
            return both[0], both[1]
        positions = self.parts[0].visit(epoch, first, last)
        return positions, positions


class _Windows:
    """Places of an epoch in windows, of which the last two that were seen are remembered."""

    def __init__(self) -> None:
        self.remembered: dict[tuple[int, int], np.ndarray] = {}

    def find_starts(self, epoch: int) -> np.ndarray:
        """The first place of each window, and the number of all places, int64 [windows + 1]."""
        raise NotImplementedError

    def open(self, epoch: int, window: int) -> np.ndarray:
        """What is in a window, int64 [..., places]."""
        raise NotImplementedError

    def visit(self, epoch: int, first: int, last: int) -> np.ndarray:
        starts, found = self.find_starts(epoch), []
        for window in range(*(np.searchsorted(starts, [first, last - 1], side="right") - [1, 0]).tolist()):
            if (epoch, window) not in self.remembered:
                self.remembered = dict([*self.remembered.items()][-1:])
                self.remembered[epoch, window] = self.open(epoch, window)
            begin = int(starts[window])
            found.append(self.remembered[epoch, window][..., max(first - begin, 0) : last - begin])
        return np.concatenate(found, axis=-1)


class _Part(_Windows):
    """Positions of one source. `cuts`, int64 [blocks + 1]: where its blocks begin, and its end."""

    def __init__(self, seed: int, number: int, cuts: np.ndarray, most: int, window: int):
        super().__init__()
        self.seed, self.number, self.cuts, self.window = seed, number, cuts, window
        self.count = int(cuts[-1] - cuts[0])
        self.in_windows = self.count > most
        self.planned: tuple[int, Any] = (-1, None)

    def find_starts(self, epoch: int) -> np.ndarray:
        return self._plan(epoch)[0] if self.in_windows else np.array([0, self.count])

    def open(self, epoch: int, window: int) -> np.ndarray:
        if not self.in_windows:
            return self.cuts[0] + _permute(self.seed, epoch, self.number, self.count)
        _, blocks, firsts = self._plan(epoch)
        chosen = blocks[firsts[window] : firsts[window + 1]]
        edges = zip(self.cuts[chosen].tolist(), self.cuts[chosen + 1].tolist(), strict=True)
        positions = np.concatenate([np.arange(first, end) for first, end in edges])
        return positions[_permute(self.seed, epoch, self.number + 1 + window, len(positions))]

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Starts of the windows; the blocks in their order; and which of these is the first of each window."""
        if self.planned[0] != epoch:
            blocks = _permute(self.seed, epoch, self.number, len(self.cuts) - 1)
            ends = np.cumsum(np.diff(self.cuts)[blocks])
            starts = np.concatenate([[0], ends[:-1]])
            firsts = np.flatnonzero(np.diff(starts // self.window, prepend=-1))
            self.planned = epoch, (np.append(starts[firsts], ends[-1]), blocks, np.append(firsts, len(blocks)))
        return self.planned[1]

    def visit_on(self, first: int, last: int) -> np.ndarray:
        """Places `first` to `last` - 1 of its epochs, one after the other."""
        found = [np.zeros(0, np.int64)]
        while first < last:
            epoch, place = divmod(first, self.count)
            found.append(self.visit(epoch, place, min(self.count, place + last - first)))
            first += len(found[-1])
        return np.concatenate(found)


class _Mixture(_Windows):
    """Positions and numbers, int64 [2, places], of several sources in proportion to their weights."""

    def __init__(self, seed: int, parts: list[_Part], weights: tuple[float, ...], most: int, window: int):
        super().__init__()
        self.seed, self.parts, total = seed, parts, sum(part.count for part in parts)
        self.quotas = apportion(total, weights)  # places of each in an epoch
        self.number = 1 if total <= most else -(-total // window)
        self.starts = np.sum([quota * np.arange(self.number + 1) // self.number for quota in self.quotas], axis=0)

    def find_starts(self, epoch: int) -> np.ndarray:
        return self.starts

    def open(self, epoch: int, window: int) -> np.ndarray:
        positions, numbers, before = [], [], 0
        for part, quota in zip(self.parts, self.quotas, strict=True):
            first, last = (quota * edge // self.number for edge in (window, window + 1))
            positions.append(part.visit_on(epoch * quota + first, epoch * quota + last))
            numbers.append(np.arange(before + first, before + last))
            before += quota
        both = np.stack([np.concatenate(positions), np.concatenate(numbers)])
        return both[:, _permute(self.seed, epoch, _MIXTURE + window, both.shape[1])]


def apportion(total: int, weights: tuple[float, ...]) -> list[int]:
    """Whole numbers of the sum `total`, as near to the proportions of the weights as can be."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    for number in sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])[: total - sum(shares)]:
        shares[number] += 1
    return shares


def _cut(bounds: np.ndarray, first: int, end: int, window: int) -> np.ndarray:
    """Where blocks begin from `first` on, and `end`: at the `bounds` between, none longer than a window.

    Without bounds between, blocks are of equal length.
    """
    inside = bounds[(bounds > first) & (bounds < end)]
    longest = window if len(inside) else _BLOCK
    cuts = np.unique([first, *inside.tolist(), end])
    pieces = [np.arange(a, b, longest) for a, b in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)]
    return np.append(np.concatenate(pieces), end)
