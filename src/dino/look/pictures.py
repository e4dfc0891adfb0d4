"""Pictures of what a model sees, as arrays and as figures: attention of each head, patch features, matching patches.

An image is a path, a PIL image or an array [h, w, 3] uint8. The model sees it resized; pictures are drawn over the
photograph at its own size, where that is larger. A map is drawn with one rectangle per patch and is not smoothed: black
where a head looks least, bright where it looks most; `Look.ranges` says how much that is. A mask keeps the image where most
of a head's attention lies and dims the rest.
"""

from __future__ import annotations

import colorsys
import io
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dino.data.decode import BadImage, decode
from dino.data.sources import evenly_spaced
from dino.look.attention import check_number, enlarge, fit_to_patches, map_attention, mass_mask
from dino.look.drawing import (
    GUTTER,
    add_scale,
    dim_outside,
    draw_heat,
    draw_mosaic,
    enlarge_cells,
    lay_over,
    stack,
    to_bytes,
)
from dino.look.patches import BASIS_IMAGES, Basis, extract_patches, fit_axes, match_mutual, prepare_image
from dino.models import NO_ATTENTION, Backbone
from dino.options.commands import AttentionOptions, MatchOptions, PcaOptions
from dino.options.rules import checked
from dino.weights import take
from dino.weights.pictures import Picture, list_pictures, read_picture

PANEL_ROWS = 10  # images of a page of a panel
IN_A_ROW = 9  # heads; more become several rows


class Fitted(NamedTuple):
    """An image of whole patches."""

    pixels: np.ndarray  # [h, w, 3] uint8, as the model gets it
    photo: np.ndarray  # [H, W, 3] uint8, the same part of it at its own size; `pixels`, where that is not smaller


AnyImage = Picture | Fitted
AnyModel = Backbone | str | os.PathLike[str]


def choose_size(model: Backbone, size: int | None) -> int:
    """Edge of an image's shorter side, pixels: `size`, or twice what the model was trained at.

    Raises:
        ValueError: `size` is not a multiple of the patch size.
    """
    patch = model.patch_size
    if size is not None and (size < patch or size % patch):
        raise ValueError(
            f"--size is {size}, not a multiple of the patch size {patch}; use {max(1, size // patch) * patch}."
        )
    return size or 2 * model.view_size // patch * patch


def fit_image(model: Backbone, image: AnyImage, size: int | None = None) -> Fitted:
    """Read `image`, resize its shorter side to `size` pixels and trim it to whole patches.

    Raises:
        ValueError: it cannot be read, is smaller than a patch, or has more than MOST_PATCHES patches.
    """
    if isinstance(image, Fitted):
        return image
    size = choose_size(model, size)
    try:
        original = decode(Path(image)) if isinstance(image, str | os.PathLike) else read_picture(image)
        pixels = fit_to_patches(original, size, model.patch_size)
        height, width = pixels.shape[:2]
        check_number(math.prod(model.grid(height, width)), height, width)  # patches may overlap
    except (BadImage, ValueError) as error:
        what = image if isinstance(image, str | os.PathLike) else "an image"
        raise ValueError(f"{what} cannot be shown: {error}") from error
    scale = min(original.shape[:2]) / size
    height, width = (
        min(whole, round(edge * scale)) for whole, edge in zip(original.shape, pixels.shape[:2], strict=False)
    )
    top, left = (original.shape[0] - height) // 2, (original.shape[1] - width) // 2
    return Fitted(pixels, original[top : top + height, left : left + width] if scale > 1 else pixels)


class Drawn:
    """What has a figure, which a notebook shows."""

    def figure(self) -> Image.Image:
        raise NotImplementedError

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.figure().save(file, "PNG")
        return file.getvalue()

    def __repr__(self) -> str:
        return f"{type(self).__name__}: .figure() is a picture of {' x '.join(map(str, self.figure().size))} pixels"


# --- attention -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Look(Drawn):
    """One image and where [CLS] looks in it, in the last block."""

    image: np.ndarray  # [h, w, 3] uint8, of whole patches
    attention: Tensor  # float32 [heads + 1, rows, columns], on the CPU: every head's, and their mean last
    mass: float  # share of the attention that masks keep
    photo: np.ndarray  # [H, W, 3] uint8, the image at its own size

    @property
    def masks(self) -> Tensor:
        """The fewest patches that hold `mass` of the attention, bool [heads + 1, h, w]."""
        return enlarge(mass_mask(self.attention, self.mass)[None], self.image.shape[:2])[0] > 0

    @property
    def maps(self) -> list[np.ndarray]:
        """Attention as colors, heads + 1 of [h, w, 3] uint8."""
        return [enlarge_cells(draw_heat(m.numpy()), self.image) for m in self.attention]

    @property
    def heated(self) -> list[np.ndarray]:
        """The photograph under each map, heads + 1 of [H, W, 3] uint8."""
        return [lay_over(self.photo, draw_heat(m.numpy())) for m in self.attention]

    @property
    def ranges(self) -> list[str]:
        """What is black and what is brightest in each map: the attention to a patch, in percent of all of a head's."""
        return [f"{100 * m.min():.2g} to {100 * m.max():.2g} %" for m in self.attention]

    @property
    def overlays(self) -> list[np.ndarray]:
        """The photograph within each mask, heads + 1 of [H, W, 3] uint8."""
        masks = enlarge(mass_mask(self.attention, self.mass)[None], self.photo.shape[:2])[0] > 0
        return [dim_outside(self.photo, m.numpy()) for m in masks]

    def only(self, head: int | None) -> Look:
        """The same image with the attention of that head alone; None: with the mean of all heads."""
        heads = len(self.attention) - 1
        if head is not None and not 0 <= head < heads:
            raise ValueError(f"--head is {head}; this model has heads 0 to {heads - 1}.")
        chosen = heads if head is None else head
        return Look(self.image, self.attention[chosen : chosen + 1], self.mass, self.photo)

    def figure(self) -> Image.Image:
        """One picture: the image, the map of each head and of their mean with its range in a row, and the masks below."""
        heads = [*(f"head {j}" for j in range(len(self.attention) - 1)), "mean"]
        titles = [f"{title}\n{said}" for title, said in zip(heads, self.ranges, strict=True)]
        masks, heated, overlays = f"{100 * self.mass:g} % of the\nattention", self.heated, self.overlays
        bands = []
        for part in (slice(start, start + IN_A_ROW) for start in range(0, len(heads), IN_A_ROW)):
            rows = [[self.photo, *heated[part]], [masks, *overlays[part]]]
            bands.append(draw_mosaic(rows, ["image\n", *titles[part]]))
        return add_scale(stack(bands))


@checked(AttentionOptions, "size", "mass")
def attention_maps(model: AnyModel, image: AnyImage, size: int | None = None, mass: float = 0.6) -> Look:
    """Attention of [CLS] over `image` in the last block, head by head (paper Figs. 1, 3 and 8-10).

    Args:
        model: a model, or its name as `dino.load` takes it; so in the functions below.
        size: shorter side of the image in pixels. None: twice what the model was trained at.
        mass: share of the attention that masks keep.

    Raises:
        ValueError: the model has no such attention, or the image cannot be shown.
    """
    model = take(model)
    if not model.has_attention:
        raise ValueError(NO_ATTENTION)
    pixels, photo = fit_image(model, image, size)
    attention = map_attention(model, prepare_image(model, pixels)).float().cpu()[0]
    return Look(pixels, torch.cat([attention, attention.mean(dim=0, keepdim=True)]), mass, photo)


def draw_panel(looks: Sequence[Look]) -> list[Image.Image]:
    """Pages of several images: a row for each, and a column for each head and their mean."""
    pages = [looks[start : start + PANEL_ROWS] for start in range(0, len(looks), PANEL_ROWS)]
    return [add_scale(draw_mosaic([[look.photo, *look.heated] for look in page])) for page in pages]


# --- patch features ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class ColoredPatches(Drawn):
    """One image, and the features of its patches as colors: similar features have similar colors."""

    image: np.ndarray  # [h, w, 3] uint8, of whole patches
    colors: np.ndarray  # float32 [rows, columns, 3] in [0, 1]
    photo: np.ndarray  # [H, W, 3] uint8, the image at its own size

    @property
    def picture(self) -> np.ndarray:
        """[H, W, 3] uint8"""
        return enlarge_cells(to_bytes(self.colors), self.photo)

    def figure(self) -> Image.Image:
        """Both side by side, at the photograph's own size."""
        return draw_mosaic([[self.photo, self.picture]], ["image", "patch features"], most=max(self.photo.shape))


@checked(PcaOptions, "size")
def pca_colors(model: AnyModel, images: Sequence[AnyImage], size: int | None = None) -> Iterator[ColoredPatches]:
    """Yield each image with the colors of its patch features. The colors are three main axes that all images share.

    Args:
        images: the axes are fitted to at most BASIS_IMAGES of them, evenly spaced.
        size: see `attention_maps`.

    Raises:
        ValueError: an image cannot be shown.
    """
    model, images = take(model), list_pictures(images)
    if not images:
        raise ValueError("there are no images; give at least one.")
    some = (images[i] for i in evenly_spaced(len(images), BASIS_IMAGES))
    basis = fit_axes(extract_patches(model, fit_image(model, image, size).pixels) for image in some)
    yield from (color_patches(model, fit_image(model, image, size), basis) for image in images)


def color_patches(model: Backbone, image: Fitted, basis: Basis) -> ColoredPatches:
    """Color the patches of `image` by their place on the axes of `basis`."""
    colors = basis.colors(extract_patches(model, image.pixels))
    return ColoredPatches(image.pixels, colors.view(*model.grid(*image.pixels.shape[:2]), 3).numpy(), image.photo)


@dataclass(frozen=True, repr=False)
class Matches(Drawn):
    """Patches of two images that are each other's nearest, most alike first."""

    images: tuple[np.ndarray, np.ndarray]  # [h, w, 3] uint8 each, of whole patches
    points: np.ndarray  # float [k, 2, 2]: the center of each pair's patches in both images, x and y in pixels
    cosine: np.ndarray  # float32 [k]
    photos: tuple[np.ndarray, np.ndarray]  # the images at their own size

    def figure(self, most: int = 50) -> Image.Image:
        """The photographs side by side, with lines between the `most` pairs that are most alike."""
        (height, width, _), (other, _, _) = (photo.shape for photo in self.photos)
        second = width + GUTTER  # where the second image begins
        page = Image.new("RGB", (second + self.photos[1].shape[1], max(height, other)), "white")
        page.paste(Image.fromarray(self.photos[0]))
        page.paste(Image.fromarray(self.photos[1]), (second, 0))
        draw, thick = ImageDraw.Draw(page), max(1, height // 250)
        zoom = [photo.shape[0] / image.shape[0] for photo, image in zip(self.photos, self.images, strict=True)]
        for (x, y), (u, v) in self.points[:most] * np.reshape(zoom, (2, 1)):
            color = tuple(int(255 * c) for c in colorsys.hsv_to_rgb((x / width + y / height) / 2, 0.9, 1.0))
            draw.line([(x, y), (u + second, v)], color, thick)
            for left, top in ((x, y), (u + second, v)):
                draw.circle((left, top), 2.5 * thick, color, "white")
        return page


@checked(MatchOptions, "size")
def match_patches(model: AnyModel, a: AnyImage, b: AnyImage, size: int | None = None) -> Matches:
    """Find the patches of `a` and `b` that correspond: each has the most similar feature to the other's (cosine)."""
    model = take(model)
    (first, second) = (fit_image(model, image, size) for image in (a, b))
    images = first.pixels, second.pixels
    pairs, cosine = match_mutual(*(extract_patches(model, image) for image in images))
    points = []
    for image, cells in zip(images, pairs.T.numpy(), strict=True):
        height, width = image.shape[:2]
        rows, columns = model.grid(height, width)
        points.append((np.stack([cells % columns, cells // columns], axis=1) + 0.5) * (width / columns, height / rows))
    return Matches(images, np.stack(points, axis=1), cosine.numpy(), (first.photo, second.photo))
