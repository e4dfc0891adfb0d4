"""A `Source` is images by position. Here are its protocol, and parts of a source: a subset, what is held out."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from dino import errors
from dino.data.decode import BadImage
from dino.randomness import Stream, draw_words

MOST_LISTED = 2**24  # images; the positions of a part of more are not listed


class Source(Protocol):
    """Images by position. The order is fixed: a position means the same image in every process and run.

    A source of files may also have `read_bytes(index) -> bytes | None` and `read_ahead(indices)`, and one of many images
    `bounds` and `parts`; see the functions `read_bytes`, `read_ahead`, `find_bounds` and `find_parts`.
    """

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; () when unlabeled."""
        ...

    @property
    def labels(self) -> np.ndarray | None:
        """int64 [n], index into `classes`, -1 = unknown; None when unlabeled."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest of names and labels: which data this is."""
        ...

    def stamp(self) -> str:
        """Hex digest of sizes and times of all files: another one means that some content may have changed."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What people see: the path relative to the folder."""
        ...

    def read(self, index: int) -> np.ndarray:
        """[h, w, 3] uint8 RGB; raises `dino.data.decode.BadImage`."""
        ...


class Subset:
    """The images of `source` at `indices` (each in [0, n)), with their names, labels and classes."""

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray):
        chosen = np.asarray(indices, dtype=np.int64)
        assert chosen.ndim == 1
        assert not chosen.size or (chosen.min() >= 0 and chosen.max() < len(source))
        self.source, self.indices, self.classes = source, chosen, source.classes
        digest = hashlib.sha256(source.fingerprint.encode() + chosen.astype("<i8").tobytes())
        self.fingerprint = digest.hexdigest()

    @property
    def labels(self) -> np.ndarray | None:
        return self._labels

    @functools.cached_property
    def _labels(self) -> np.ndarray | None:
        return None if self.source.labels is None else self.source.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def locate(self, index: int) -> int:
        """The position in `source`."""
        return int(self.indices[index])

    def count_before(self, positions: np.ndarray) -> np.ndarray | None:
        """How many of these images lie before each position of `source`; None where they have another order."""
        return np.searchsorted(self.indices, positions) if (np.diff(self.indices) > 0).all() else None

    def name(self, index: int) -> str:
        return self.source.name(self.locate(index))

    def read_ahead(self, indices: Sequence[int]) -> None:
        read_ahead(self.source, [self.locate(index) for index in indices])

    def stamp(self) -> str:
        return self.source.stamp()

    def read(self, index: int) -> np.ndarray:
        return self.source.read(self.locate(index))

    def read_bytes(self, index: int) -> bytes | None:
        return read_bytes(self.source, self.locate(index))


class Remaining(Subset):
    """All images of a large source but few, without a list of them. `left_out`: sorted positions."""

    def __init__(self, source: Source, left_out: np.ndarray):
        self.source, self.left_out, self.classes = source, left_out, source.classes
        digest = hashlib.sha256(b"remaining" + source.fingerprint.encode() + left_out.astype("<i8").tobytes())
        self.fingerprint = digest.hexdigest()

    @functools.cached_property
    def _labels(self) -> np.ndarray | None:
        return None if self.source.labels is None else np.delete(self.source.labels, self.left_out)

    def __len__(self) -> int:
        return len(self.source) - len(self.left_out)

    def locate(self, index: int) -> int:
        kept_before = self.left_out - np.arange(len(self.left_out))  # images that remain before each that does not
        return index + int(np.searchsorted(kept_before, index, side="right"))

    def count_before(self, positions: np.ndarray) -> np.ndarray | None:
        return positions - np.searchsorted(self.left_out, positions)


class Parts(NamedTuple):
    """Where the sources lie that were put together, int64 [parts + 1], and how often their images are visited."""

    bounds: np.ndarray
    weights: tuple[float, ...]


def find_parts(source: Source) -> Parts | None:
    """The parts of a source that are visited in other proportions than their sizes; None: there are none."""
    if isinstance(source, Subset):
        found = find_parts(source.source)
        bounds = None if found is None else source.count_before(found.bounds)
        return None if found is None or bounds is None else Parts(bounds, found.weights)
    return getattr(source, "parts", None)


def find_bounds(source: Source) -> np.ndarray | None:
    """The first positions of neighbors that are best read together, as those in a shard, and the end; None: of none."""
    if isinstance(source, Subset):
        found = find_bounds(source.source)
        return None if found is None else source.count_before(found)
    return getattr(source, "bounds", None)


def read_bytes(source: Source, index: int) -> bytes | None:
    """The image file at `index` as it is; None where a source has none, or one too large to be read whole."""
    read = getattr(source, "read_bytes", None)
    return None if read is None else read(index)


def read_ahead(source: Source, indices: Sequence[int]) -> None:
    """Tell a source what `read` or `read_bytes` will be asked for, where that takes a while."""
    if (begin := getattr(source, "read_ahead", None)) is not None:
        begin(indices)


def hold_out(source: Source, fraction: float, maximum: int, seed: int) -> tuple[Source, Source | None]:
    """Training images and min(maximum, round(fraction * n)) held-out ones, both in the order of `source`.

    At least one image stays for training. The second is None when nothing is held out. The choice depends on n and
    `seed` alone, whatever the version of NumPy.
    """
    count = min(maximum, round(fraction * len(source)), len(source) - 1)
    if count <= 0:
        return source, None
    if len(source) > MOST_LISTED:
        drawn = draw_words(Stream.HELD_OUT, seed, 2 * count) % np.uint64(len(source))
        held = np.sort(np.array([*dict.fromkeys(drawn.tolist())][:count]))
        return Remaining(source, held), Subset(source, held)
    order = np.argsort(draw_words(Stream.HELD_OUT, seed, len(source)), kind="stable")
    return Subset(source, np.sort(order[count:])), Subset(source, np.sort(order[:count]))


def evenly_spaced(total: int, most: int) -> Sequence[int]:
    """At most `most` evenly spaced positions of `total`."""
    return range(total) if total <= most else np.linspace(0, total - 1, most).astype(int).tolist()


def spread_over_classes(source: Source, most: int, candidates: int = 48) -> list[int]:
    """Positions of `candidates` evenly spaced images, in an order of which the first `most` are of different classes, as far
    as there are so many, and evenly spaced themselves. An image without a class stands for itself."""
    positions = evenly_spaced(len(source), candidates)
    first: dict[int, int] = {}  # a class to its first position
    for i in positions:
        label = -1 if source.labels is None else source.labels[i]
        first.setdefault(label if label >= 0 else -1 - i, i)
    chosen = [*first.values()]
    return [*dict.fromkeys([*(chosen[i] for i in evenly_spaced(len(chosen), most)), *chosen, *positions])]


def look_at_some(source: Source, most: int = 64) -> dict[str, str]:
    """What there is to see of at most so many images: by name, a digest of the file, or why it cannot be read."""
    positions, seen = list(evenly_spaced(len(source), most)), dict[str, str]()
    read_ahead(source, positions)
    for index in positions:
        try:
            content = read_bytes(source, index)
            if content is None:
                source.read(index)
            seen[source.name(index)] = hashlib.sha256(content or b"").hexdigest()
        except (BadImage, OSError) as error:
            seen[source.name(index)] = errors.find_reason(error)
    return seen


def read_or_gray(source: Source, index: int) -> np.ndarray:
    """[h, w, 3] uint8: an image, or a gray square where it cannot be read."""
    try:
        return source.read(index)
    except BadImage:
        return np.full((64, 64, 3), 160, np.uint8)
