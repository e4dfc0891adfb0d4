"""How an image is resized for a model that is evaluated: the central square, the whole image stretched, or shrunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import Image

LONGEST = 64  # times the shorter side. What lies beyond is cut off before an image is resized


def choose_edge(size: int) -> int:
    """Shorter side to which an image is resized before its central square of `size` is taken, pixels."""
    return size * 256 // 224 if size >= 128 else size


def resize_and_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The reference's evaluation view: shorter side to size * 256 / 224 by bicubic, then the central square.

    Below 128 pixels the shorter side becomes `size` itself, so that small images keep their border.

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
    edge = choose_edge(size)
    scale = edge / min(height, width)
    # torchvision's Resize truncates the longer side, too.
    new_width, new_height = (edge, int(height * scale)) if width <= height else (int(width * scale), edge)
    resized = Image.fromarray(image).resize((max(new_width, edge), max(new_height, edge)), Image.Resampling.BICUBIC)
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def stretch(image: np.ndarray, size: int) -> np.ndarray:
    """The whole image as a square, its aspect ratio ignored, by bicubic."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def shrink(image: np.ndarray, size: int) -> np.ndarray:
    """The whole image with its longer side at `size` at most, its aspect ratio kept; a smaller image stays as it is."""
    small = Image.fromarray(image)
    small.thumbnail((size, size), Image.Resampling.LANCZOS)
    return np.asarray(small)


Resize = Literal["center", "stretched", "shrunk"]

# From an image [h, w, 3] uint8 and a size, pixels, to the view that the model gets.
RESIZES: dict[Resize, Callable[[np.ndarray, int], np.ndarray]] = {
    "center": resize_and_crop,
    "stretched": stretch,
    "shrunk": shrink,
}
