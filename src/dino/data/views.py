"""Parameters of views (boxes, flips, color changes), drawn at random; `dino.data.render` makes pixels of them.

Every number is a function of (seed, epoch, sample index) alone, so a run is the same for any number of workers and
ranks and a resume is exact. Each sample has a generator of its own. Each view takes a row of `_SLOTS` uniform numbers
from it, and each place in the row has a fixed meaning: changing one option, or the number of local views, changes no
other numbers. The distributions are those of the paper's multi-crop and color augmentations (sections 3.1 and 3.2, after
SwAV and BYOL) as torchvision's transforms define them.

Axes: n images, v views of each, globals first.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from dino.options import required
from dino.options.train import ViewOptions
from dino.randomness import Stream, open_stream

_BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

_ATTEMPTS = 10  # boxes tried before the central one is taken
_RATIO = (3 / 4, 4 / 3)  # width / height of a box, log-uniform
_ORDERS = np.array(list(itertools.permutations(range(4))), np.int8)

# Places of a view's uniform numbers in its row. They must never change.
_AREA, _LOG_RATIO = slice(0, 10), slice(10, 20)
_TOP, _LEFT, _FLIP, _JITTER, _ORDER = range(20, 25)
_FACTORS = slice(25, 29)
_GRAY, _BLUR, _SIGMA, _SOLARIZE = range(29, 33)
_SLOTS = 40


def group_views(sizes: Sequence[int]) -> list[slice]:
    """The 2 global views, then runs of views of equal size; each group is one tensor and one pass of the backbone."""
    ends = [i for i in range(1, len(sizes)) if i == 2 or sizes[i] != sizes[i - 1]]
    return [slice(a, b) for a, b in itertools.pairwise([0, *ends, len(sizes)])]


@dataclass(frozen=True)
class Views:
    """Parameters of v views of n images."""

    sizes: tuple[int, ...]
    """[v] output edge of each view, pixels; globals first."""
    box: np.ndarray
    """int32 [n, v, 4] top, left, height, width in pixels of the source."""
    flip: np.ndarray
    """bool [n, v]"""
    jitter: np.ndarray
    """bool [n, v]; where False, `order` and `factors` are not used."""
    order: np.ndarray
    """int8 [n, v, 4] order in which 0 brightness, 1 contrast, 2 saturation, 3 hue are applied."""
    factors: np.ndarray
    """float32 [n, v, 4] factors of brightness, contrast and saturation; hue shift in turns."""
    gray: np.ndarray
    """bool [n, v]"""
    sigma: np.ndarray
    """float32 [n, v] blur standard deviation in pixels of the view; 0 is none."""
    solarize: np.ndarray
    """bool [n, v]"""

    @property
    def groups(self) -> list[slice]:
        return group_views(self.sizes)

    def of(self, images: Sequence[int]) -> Views:
        """The parameters of some images, by position."""
        drawn = [field.name for field in fields(self) if field.name != "sizes"]
        return replace(self, **{name: getattr(self, name)[list(images)] for name in drawn})


def draw_views(options: ViewOptions, seed: int, epoch: int, indices: Sequence[int], shapes: np.ndarray) -> Views:
    """Views of the samples `indices` at `epoch`, for images of `shapes` [n, 2] (height, width)."""
    assert shapes.shape == (len(indices), 2)
    num_views = len(options.sizes)
    # One call per sample, a row per view: the numbers depend neither on the batch nor on the number of views.
    draws = [open_stream(Stream.VIEWS, seed, epoch, i).random((num_views, _SLOTS)) for i in indices]
    u = np.stack(draws) if draws else np.empty((0, num_views, _SLOTS))

    kinds = np.minimum(np.arange(num_views), 2)  # first global, second global, local
    large, small = required(options.global_scale), required(options.local_scale)
    scales = np.array([large, large, small])[kinds]
    blur = u[..., _BLUR] < np.array(required(options.blur_prob))[kinds]
    low, high = options.blur_sigma
    unchanged = np.array([1, 1, 1, 0])
    reach = np.array([options.brightness, options.contrast, options.saturation, options.hue])
    return Views(
        sizes=options.sizes,
        box=_boxes(u, scales, shapes),
        flip=u[..., _FLIP] < options.flip_prob,
        jitter=u[..., _JITTER] < options.jitter_prob,
        order=_ORDERS[(u[..., _ORDER] * len(_ORDERS)).astype(np.intp)],
        factors=(unchanged + reach * (2 * u[..., _FACTORS] - 1)).astype(np.float32),
        gray=u[..., _GRAY] < options.gray_prob,
        sigma=np.where(blur, low + (high - low) * u[..., _SIGMA], 0).astype(np.float32),
        solarize=u[..., _SOLARIZE] < np.array(options.solarize_prob)[kinds],
    )


def _boxes(u: np.ndarray, scales: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """int32 [n, v, 4]: the first of ten boxes of random area and ratio that fits, else a central one.

    `scales` [v, 2] are the bounds of the share of the area. The same as torchvision's RandomResizedCrop, with its rounding.
    """
    height, width = (shapes[:, i, None, None].astype(np.float64) for i in (0, 1))
    low, high = scales[:, 0, None], scales[:, 1, None]
    area = height * width * (low + (high - low) * u[..., _AREA])
    log_low, log_high = np.log(_RATIO)
    ratio = np.exp(log_low + (log_high - log_low) * u[..., _LOG_RATIO])
    h, w = np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))  # [n, v, attempts]
    fits = (h > 0) & (w > 0) & (h <= height) & (w <= width)

    first = fits.argmax(-1)[..., None]  # 0 where none fits; replaced below
    h, w = (np.take_along_axis(edge, first, -1)[..., 0] for edge in (h, w))
    height, width = height[..., 0], width[..., 0]
    top = np.floor(u[..., _TOP] * (height - h + 1))
    left = np.floor(u[..., _LEFT] * (width - w + 1))
    boxes = np.where(fits.any(-1)[..., None], np.stack([top, left, h, w], -1), _central(shapes)[:, None])
    return boxes.astype(np.int32)


def _central(shapes: np.ndarray) -> np.ndarray:
    """[n, 4]: the largest central box of an allowed ratio."""
    height, width = shapes[:, 0].astype(np.float64), shapes[:, 1].astype(np.float64)
    narrow, wide = _RATIO
    h = np.minimum(height, np.rint(width / narrow))
    w = np.minimum(width, np.rint(height * wide))
    return np.stack([(height - h) // 2, (width - w) // 2, h, w], -1)
