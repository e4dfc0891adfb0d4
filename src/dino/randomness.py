"""TODO."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What random numbers are for; streams of one (seed, epoch) never overlap."""

    ORDER = 1
    VIEWS = 2
    DEPTH = 3


def generator(stream: Stream, seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one thing: 2**128 Philox blocks that no other (stream, seed, epoch, index) shares."""
    key = np.array([seed, epoch], np.uint64)
    counter = np.array([0, 0, index, stream], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
