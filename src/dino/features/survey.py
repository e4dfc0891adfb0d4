"""What there is to know of images before a training: from some of them, read evenly over all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import cv2
import numpy as np

from dino.data.decode import BadImage
from dino.data.sources import Source, evenly_spaced
from dino.features.copies import EDGE, LEAST_SKETCH, is_copy, make_sketch
from dino.terminal import track

LOOKED_AT = 400  # images


class Survey(NamedTuple):
    """What was found; of images that could not be read only their names."""

    total: int  # images, of which `looked` were read
    looked: int
    bad: list[str]  # "name: reason"
    formats: Counter[str]  # of the files' names; "" has none
    sides: np.ndarray  # the shorter side of each, pixels
    colors: np.ndarray  # the mean of each, [n, 3], from 0 to 1
    squares: np.ndarray  # the mean of squares of each, [n, 3]
    copies: int  # near-copies of another one looked at

    @property
    def of(self) -> str:
        return f"of {self.looked:,} looked at" if self.total > self.looked else f"of {self.total:,}"


def survey(sources: Sequence[Source]) -> Survey:
    """Read some hundred images."""
    total = sum(map(len, sources))
    chosen = [(each, i) for each in sources for i in evenly_spaced(len(each), 1 + LOOKED_AT * len(each) // total)]
    sides, bad, colors, thumbnails = list[int](), list[str](), list[list[np.ndarray]](), list[np.ndarray]()
    for each, position in track(chosen, len(chosen), "images"):
        try:
            pixels = each.read(position)
        except BadImage as error:
            bad.append(f"{each.name(position)}: {error.reason}")
            continue
        sides.append(min(pixels.shape[:2]))
        scaled = pixels.reshape(-1, 3) / 255
        colors.append([scaled.mean(axis=0), (scaled**2).mean(axis=0)])
        thumbnails.append(cv2.resize(pixels, (EDGE, EDGE), interpolation=cv2.INTER_AREA))
    formats = Counter(PurePosixPath(each.name(position)).suffix.lower() for each, position in chosen)
    means, squares = np.array(colors).reshape(-1, 2, 3).swapaxes(0, 1)
    return Survey(total, len(chosen), bad, formats, np.array(sides), means, squares, count_copies(thumbnails))


def write_range(values: np.ndarray) -> str:
    """ "48 to 300"; "48" where all are equal."""
    low, high = values.min(), values.max()
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def count_copies(thumbnails: list[np.ndarray]) -> int:
    """How many of the images [EDGE, EDGE, 3] uint8 are near-copies of one before them."""
    if not thumbnails:
        return 0
    sketches = np.stack([make_sketch(thumbnail) for thumbnail in thumbnails])
    likely = np.argwhere(np.tril(sketches @ sketches.T >= LEAST_SKETCH, -1))
    return len({int(a) for a, b in likely if is_copy(thumbnails[a], thumbnails[b])})
