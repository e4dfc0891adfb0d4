"""Pictures of what a model sees, as arrays and as figures: attention of each head, patch features, matching patches.

An image is a path or an array [h, w, 3] uint8. A map is drawn with one rectangle per patch and is not smoothed: black
where a head does not look, bright where it looks most. A mask keeps the image where most of a head's attention lies and
dims the rest.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dino import files
from dino.data.decode import BadImage, decode
from dino.data.sources import evenly_spaced
from dino.look.attention import check_number, enlarge, fit_to_patches, map_attention, mass_mask
from dino.look.patches import BASIS_IMAGES, Basis, extract_patches, fit_axes, match_mutual, prepare_image
from dino.look.video import Clip, Frame, thin_out
from dino.models import NO_ATTENTION, Backbone
from dino.options.commands import AttentionOptions, MatchOptions, PcaOptions, VideoOptions
from dino.options.rules import checked

GUTTER = 6  # pixels between the pictures of a figure
AnyImage = str | Path | np.ndarray  # a file, or pixels [h, w, 3] uint8


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


def fit_image(model: Backbone, image: AnyImage, size: int | None = None) -> np.ndarray:
    """Read `image`, resize its shorter side to `size` pixels and trim it to whole patches: [h, w, 3] uint8.

    Raises:
        ValueError: it cannot be read, is smaller than a patch, or has more than MOST_PATCHES patches.
    """
    size = choose_size(model, size)
    try:
        pixels = fit_to_patches(image if isinstance(image, np.ndarray) else decode(image), size, model.patch_size)
        height, width = pixels.shape[:2]
        check_number(math.prod(model.grid(height, width)), height, width)  # patches may overlap
    except (BadImage, ValueError) as error:
        what = "an image" if isinstance(image, np.ndarray) else image
        raise ValueError(f"{what} cannot be shown: {error}") from error
    return pixels


# --- attention -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """One image and where [CLS] looks in it, in the last block."""

    image: np.ndarray  # [h, w, 3] uint8, of whole patches
    attention: Tensor  # float32 [heads + 1, rows, columns], on the CPU: every head's, and their mean last
    mass: float  # share of the attention that masks keep

    @property
    def masks(self) -> Tensor:
        """The fewest patches that hold `mass` of the attention, bool [heads + 1, h, w]."""
        return enlarge(mass_mask(self.attention, self.mass)[None], self.image.shape[:2])[0] > 0

    @property
    def maps(self) -> list[np.ndarray]:
        """Attention as colors, heads + 1 of [h, w, 3] uint8."""
        return [enlarge_cells(draw_heat(m.numpy()), self.image) for m in self.attention]

    @property
    def overlays(self) -> list[np.ndarray]:
        """The image within each mask, heads + 1 of [h, w, 3] uint8."""
        return [dim_outside(self.image, m.numpy()) for m in self.masks]

    def only(self, head: int | None) -> Look:
        """The same image with the attention of that head alone; None: with the mean of all heads."""
        heads = len(self.attention) - 1
        if head is not None and not 0 <= head < heads:
            raise ValueError(f"--head is {head}; this model has heads 0 to {heads - 1}.")
        chosen = heads if head is None else head
        return Look(self.image, self.attention[chosen : chosen + 1], self.mass)

    def figure(self) -> Image.Image:
        """One picture: the image, the map of each head and of their mean in a row, and the masks below."""
        return draw_mosaic([[self.image, *self.maps], [f"{100 * self.mass:g} % of the\nattention", *self.overlays]])


@checked(AttentionOptions, "size", "mass")
def attention_maps(model: Backbone, image: AnyImage, size: int | None = None, mass: float = 0.6) -> Look:
    """Attention of [CLS] over `image` in the last block, head by head (paper Figs. 1, 3 and 8-10).

    Args:
        size: shorter side of the image in pixels. None: twice what the model was trained at.
        mass: share of the attention that masks keep.

    Raises:
        ValueError: the model has no such attention, or the image cannot be shown.
    """
    if not model.has_attention:
        raise ValueError(NO_ATTENTION)
    pixels = fit_image(model, image, size)
    attention = map_attention(model, prepare_image(model, pixels)).float().cpu()[0]
    return Look(pixels, torch.cat([attention, attention.mean(dim=0, keepdim=True)]), mass)


def draw_panel(looks: Sequence[Look]) -> Image.Image:
    """One picture of several images: a row for each, and a column for each head and their mean."""
    return draw_mosaic([[look.image, *look.maps] for look in looks])


# --- patch features ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ColoredPatches:
    """One image, and the features of its patches as colors: similar features have similar colors."""

    image: np.ndarray  # [h, w, 3] uint8, of whole patches
    colors: np.ndarray  # float32 [rows, columns, 3] in [0, 1]

    @property
    def picture(self) -> np.ndarray:
        return enlarge_cells(to_bytes(self.colors), self.image)

    def figure(self) -> Image.Image:
        return draw_mosaic([[self.image, self.picture]], ["image", "patch features"])


@checked(PcaOptions, "size")
def pca_colors(model: Backbone, images: Sequence[AnyImage], size: int | None = None) -> Iterator[ColoredPatches]:
    """Yield each image with the colors of its patch features. The colors are three main axes that all images share.

    Args:
        images: the axes are fitted to at most BASIS_IMAGES of them, evenly spaced.
        size: see `attention_maps`.

    Raises:
        ValueError: an image cannot be shown.
    """
    some = (images[i] for i in evenly_spaced(len(images), BASIS_IMAGES))
    basis = fit_axes(extract_patches(model, fit_image(model, image, size)) for image in some)
    yield from (color_patches(model, fit_image(model, image, size), basis) for image in images)


def color_patches(model: Backbone, pixels: np.ndarray, basis: Basis) -> ColoredPatches:
    """Color the patches of `pixels` [h, w, 3] uint8, an image of whole patches, by their place on the axes of `basis`."""
    colors = basis.colors(extract_patches(model, pixels))
    return ColoredPatches(pixels, colors.view(*model.grid(*pixels.shape[:2]), 3).numpy())


@dataclass(frozen=True)
class Matches:
    """Patches of two images that are each other's nearest, most alike first."""

    images: tuple[np.ndarray, np.ndarray]  # [h, w, 3] uint8 each, of whole patches
    points: np.ndarray  # float [k, 2, 2]: the center of each pair's patches in both images, x and y in pixels
    cosine: np.ndarray  # float32 [k]

    def figure(self, most: int = 50) -> Image.Image:
        """The images side by side, with lines between the `most` pairs that are most alike."""
        (height, width, _), (other, _, _) = (image.shape for image in self.images)
        second = width + GUTTER  # where the second image begins
        page = Image.new("RGB", (second + self.images[1].shape[1], max(height, other)), "white")
        page.paste(Image.fromarray(self.images[0]))
        page.paste(Image.fromarray(self.images[1]), (second, 0))
        draw, thick = ImageDraw.Draw(page), max(1, height // 250)
        for (x, y), (u, v) in self.points[:most]:
            color = tuple(int(255 * c) for c in colorsys.hsv_to_rgb((x / width + y / height) / 2, 0.9, 1.0))
            draw.line([(x, y), (u + second, v)], color, thick)
            for left, top in ((x, y), (u + second, v)):
                draw.circle((left, top), 2.5 * thick, color, "white")
        return page


@checked(MatchOptions, "size")
def match_patches(model: Backbone, a: AnyImage, b: AnyImage, size: int | None = None) -> Matches:
    """Find the patches of `a` and `b` that correspond: each has the most similar feature to the other's (cosine)."""
    images = fit_image(model, a, size), fit_image(model, b, size)
    pairs, cosine = match_mutual(*(extract_patches(model, image) for image in images))
    points = []
    for image, cells in zip(images, pairs.T.numpy(), strict=True):
        height, width = image.shape[:2]
        rows, columns = model.grid(height, width)
        points.append((np.stack([cells % columns, cells // columns], axis=1) + 0.5) * (width / columns, height / rows))
    return Matches(images, np.stack(points, axis=1), cosine.numpy())


# --- video ---------------------------------------------------------------------------------------------------------


@checked(VideoOptions, "show", "size", "head", "mass")
def video_frames(
    model: Backbone,
    clip: str | Path | Clip,
    show: Literal["attention", "mask", "pca"] = "attention",
    size: int | None = None,
    head: int | None = None,
    mass: float = 0.6,
) -> Iterator[tuple[Frame, Frame]]:
    """Yield each frame of `clip`, fitted to whole patches, and its picture; `dino.look.video.write_video` takes them.

    Args:
        clip: a video file, an animated GIF, or a folder of frames.
        show: a map of attention, the image within its mask, or patch features as colors, on one basis for the clip.
        head: the head whose attention is shown. None: the mean of all.
        size, mass: see `attention_maps`.
    """
    clip = clip if isinstance(clip, Clip) else Clip(clip)
    basis = None
    if show == "pca":
        some = thin_out((fit_image(model, frame, size) for _, frame in clip), BASIS_IMAGES)
        basis = fit_axes(extract_patches(model, frame) for frame in some)
    for seconds, frame in clip:
        if basis is not None:
            drawn = color_patches(model, fit_image(model, frame, size), basis)
            picture = drawn.picture
        else:
            drawn = attention_maps(model, frame, size, mass).only(head)
            (picture,) = drawn.maps if show == "attention" else drawn.overlays
        yield Frame(seconds, drawn.image), Frame(seconds, picture)


def save(picture: Image.Image, path: str | Path) -> None:
    """Write a picture in the format that the suffix of `path` names: the whole file, or none.

    Raises:
        WriteError: it cannot be written.
    """
    with files.replacing(Path(path)) as temporary:
        picture.save(temporary, Image.registered_extensions()[Path(path).suffix.lower()])


# --- drawing -------------------------------------------------------------------------------------------------------


def draw_heat(values: np.ndarray) -> np.ndarray:
    """A map [rows, columns] of numbers not below 0 as colors [rows, columns, 3] uint8; the largest is brightest."""
    return to_bytes(colormaps["inferno"](values / max(float(values.max()), 1e-12))[..., :3])


def to_bytes(colors: np.ndarray) -> np.ndarray:
    return (colors * 255 + 0.5).astype(np.uint8)


def enlarge_cells(cells: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Colors of patches [rows, columns, 3] as a picture of the size of `image`; each patch becomes a rectangle."""
    return np.asarray(Image.fromarray(cells).resize(image.shape[1::-1], Image.Resampling.NEAREST))


def dim_outside(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`image` where `mask` is true; elsewhere a dark gray shade of it."""
    shade = image.mean(axis=-1, keepdims=True) * 0.25 + 12
    return np.where(mask[..., None], image, shade).astype(np.uint8)


def draw_mosaic(rows: Sequence[Sequence[np.ndarray | str]], titles: Sequence[str] | None = None) -> Image.Image:
    """One picture of rows of pictures [h, w, 3] uint8 (or texts), with a title above each column.

    Args:
        titles: None: the columns are an image, its heads and their mean.
    """
    titles = titles or ["image", *(f"head {j}" for j in range(len(rows[0]) - 2)), "mean"]
    pictures = [[cell for cell in row if not isinstance(cell, str)] for row in rows]
    width = max(cell.shape[1] for row in pictures for cell in row)
    heights = [max(cell.shape[0] for cell in row) for row in pictures]
    label = max(12, width // 14)
    font = ImageFont.load_default(label)
    size = GUTTER + len(titles) * (width + GUTTER), label + sum(heights) + (len(rows) + 2) * GUTTER
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for column, title in enumerate(titles):
        left, top = GUTTER + column * (width + GUTTER), GUTTER
        draw.text((left, top), title, "black", font)
        top += label + GUTTER
        for row, height in zip(rows, heights, strict=True):
            if isinstance(cell := row[column], str):
                draw.text((left, top), cell, "black", font)
            else:
                page.paste(Image.fromarray(cell), (left, top))
            top += height + GUTTER
    return page
