"""Several sources as one, in the order in which they are named."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from dino.data.labels import sort_classes
from dino.data.sources import Parts, Source, find_bounds, read_ahead, read_bytes


class Together:
    """A `Source` of the images of several. Classes of one name are one class; images of an unlabeled source have none.

    Args:
        names: of the sources; `name(i)` begins with one.
        weights: how often images of each are visited in training, in proportion; None: as often as there are images.
    """

    def __init__(self, sources: Sequence[Source], names: Sequence[str], weights: tuple[float, ...] | None = None):
        self.sources, self.names = sources, names
        self.starts = np.cumsum([0, *map(len, sources)])
        self.parts = None if weights is None else Parts(self.starts, weights)
        inner = [[0] if (found := find_bounds(source)) is None else found[:-1] for source in sources]
        begins = [start + np.asarray(b) for start, b in zip(self.starts, inner, strict=False)]
        self.bounds = np.concatenate([*begins, self.starts[-1:]])
        self.classes = sort_classes({name for source in sources for name in source.classes})
        self.labels = np.concatenate([self._translate(source) for source in sources]) if self.classes else None
        self.fingerprint = hashlib.sha256("\n".join(source.fingerprint for source in sources).encode()).hexdigest()

    def _translate(self, source: Source) -> np.ndarray:
        """A source's labels as numbers of all classes, int64."""
        if source.labels is None:
            return np.full(len(source), -1, np.int64)
        known = {name: number for number, name in enumerate(self.classes)}
        return np.array([*(known[name] for name in source.classes), -1], np.int64)[source.labels]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """Which source it is, and the position there."""
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return number, index - int(self.starts[number])

    def name(self, index: int) -> str:
        number, position = self.locate(index)
        return f"{self.names[number]}/{self.sources[number].name(position)}"

    def stamp(self) -> str:
        return hashlib.sha256("\n".join(source.stamp() for source in self.sources).encode()).hexdigest()

    def read_ahead(self, indices: Sequence[int]) -> None:
        found = [self.locate(index) for index in indices]
        for number, source in enumerate(self.sources):
            if wanted := [position for which, position in found if which == number]:
                read_ahead(source, wanted)

    def read(self, index: int) -> np.ndarray:
        number, position = self.locate(index)
        return self.sources[number].read(position)

    def read_bytes(self, index: int) -> bytes | None:
        number, position = self.locate(index)
        return read_bytes(self.sources[number], position)
