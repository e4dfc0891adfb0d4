"""TODO."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from dino.models import Recompute


class Split(NamedTuple):
    """How a step is computed."""

    parts: int = 1
    recompute: Recompute = "nothing"


def split_images(images: int, parts: int) -> list[slice]:
    """`images` in at most `parts` runs whose lengths differ by one at most."""
    bounds = [images * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(bounds) if b > a]


def slice_views(groups: Sequence[Tensor], images: slice, total: int) -> list[Tensor]:
    """The views of some of the `total` images in view-major groups, view-major again."""
    return [group.unflatten(0, (-1, total))[:, images].flatten(0, 1) for group in groups]


def slice_noise(draws: Sequence[Tensor], images: slice) -> list[Tensor]:
    """What `ViewBatches.draws` drew for some of the images, as the student takes it: [num, v * images] by group."""
    return [group[:, :, images].flatten(1) for group in draws]
