"""How an image is resized for a model that is evaluated: the central square, the whole image stretched, or shrunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import Image

from dino.models.preprocessing import IMAGENET, Preprocessing

LONGEST = 64  # times the shorter side. What lies beyond is cut off before an image is resized


def resize_and_crop(image: np.ndarray, size: int, wanted: Preprocessing = IMAGENET) -> np.ndarray:
    """The evaluation view: the shorter side to `wanted.choose_edge(size)`, then the central square.

    As in the reference that is size * 256 / 224 by bicubic, where the weights want nothing else.

    Args:
        image: [h, w, 3] uint8.

    Returns:
        [size, size, 3] uint8.
    """
    height, width = image.shape[:2]
    # The square is far from the ends of a very long image, which would take much memory when enlarged.
    top, left = max(0, (height - LONGEST * width) // 2), max(0, (width - LONGEST * height) // 2)
    image = image[top : height - top, left : width - left]
    height, width = image.shape[:2]
    edge = wanted.choose_edge(size)
    scale = edge / min(height, width)
    # torchvision's Resize truncates the longer side, too.
    new_width, new_height = (edge, int(height * scale)) if width <= height else (int(width * scale), edge)
    resized = Image.fromarray(image).resize((max(new_width, edge), max(new_height, edge)), _find_filter(wanted))
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def stretch(image: np.ndarray, size: int, wanted: Preprocessing = IMAGENET) -> np.ndarray:
    """The whole image as a square, its aspect ratio ignored."""
    return np.asarray(Image.fromarray(image).resize((size, size), _find_filter(wanted)))


def shrink(image: np.ndarray, size: int, wanted: Preprocessing = IMAGENET) -> np.ndarray:
    """The whole image with its longer side at `size` at most, its aspect ratio kept; a smaller image stays as it is."""
    small = Image.fromarray(image)
    small.thumbnail((size, size), Image.Resampling.LANCZOS)
    return np.asarray(small)


def make_square(image: np.ndarray, size: int, wanted: Preprocessing) -> np.ndarray:
    """The view of an image [h, w, 3] uint8 that weights want: [size, size, 3]."""
    if wanted.resize == "center":
        return resize_and_crop(image, size, wanted)
    edge = wanted.choose_edge(size)
    start = round((edge - size) / 2)
    return stretch(image, edge, wanted)[start : start + size, start : start + size]


def _find_filter(wanted: Preprocessing) -> Image.Resampling:
    return Image.Resampling[wanted.interpolation.upper()]


Resize = Literal["as trained", "stretched", "shrunk"]

# From an image [h, w, 3] uint8, a size in pixels and what the weights want to the view that the model gets.
RESIZES: dict[Resize, Callable[[np.ndarray, int, Preprocessing], np.ndarray]] = {
    "as trained": make_square,
    "stretched": stretch,
    "shrunk": shrink,
}
