"""How pictures are drawn: maps as colors, masks, and figures of rows of pictures. Pictures are arrays [h, w, 3] uint8."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont

from dino import files

GUTTER = 6  # pixels between the pictures of a figure
LEAST_CELL, MOST_CELL = 160, 640  # pixels of the longer side of a picture in a figure of several


def save(picture: Image.Image, path: str | Path) -> None:
    """Write a picture in the format that the suffix of `path` names: the whole file, or none.

    Raises:
        WriteError: it cannot be written.
    """
    with files.replacing(Path(path)) as temporary:
        picture.save(temporary, Image.registered_extensions()[Path(path).suffix.lower()])


def draw_heat(values: np.ndarray) -> np.ndarray:
    """A map [rows, columns] as colors [rows, columns, 3] uint8: the least is black, the largest brightest."""
    low, high = float(values.min()), float(values.max())
    return to_bytes(colormaps["inferno"]((values - low) / max(high - low, 1e-12))[..., :3])


def lay_over(photo: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """A photograph [H, W, 3] under the colors of its patches [rows, columns, 3]."""
    return (0.4 * photo + 0.6 * enlarge_cells(cells, photo)).astype(np.uint8)


def to_bytes(colors: np.ndarray) -> np.ndarray:
    return (colors * 255 + 0.5).astype(np.uint8)


def enlarge_cells(cells: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Colors of patches [rows, columns, 3] as a picture of the size of `image`; each patch becomes a rectangle."""
    return np.asarray(Image.fromarray(cells).resize(image.shape[1::-1], Image.Resampling.NEAREST))


def dim_outside(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`image` where `mask` is true; elsewhere a dark gray shade of it."""
    shade = image.mean(axis=-1, keepdims=True) * 0.25 + 12
    return np.where(mask[..., None], image, shade).astype(np.uint8)


def fit_cell(picture: np.ndarray, most: int = MOST_CELL) -> np.ndarray:
    """`picture` [h, w, 3] with a longer side of at least LEAST_CELL (by whole factors) and at most `most` pixels."""
    edge = max(picture.shape[:2])
    if edge > most:
        (small := Image.fromarray(picture)).thumbnail((most, most), Image.Resampling.LANCZOS)
        return np.asarray(small)
    zoom = -(-LEAST_CELL // edge)
    return picture.repeat(zoom, axis=0).repeat(zoom, axis=1)


def add_scale(page: Image.Image) -> Image.Image:
    """`page` with the colors of maps beneath it."""
    edge = max(14, min(24, page.width // 80))
    out = Image.new("RGB", (page.width, page.height + 2 * edge), "white")
    out.paste(page)
    draw, font = ImageDraw.Draw(out), ImageFont.load_default(edge)
    bar = Image.fromarray(draw_heat(np.linspace(0, 1, 256)[None])).resize((6 * edge, edge))
    left, top = GUTTER, page.height + edge // 2
    for part in ("least", bar, "most attention of each map"):
        if isinstance(part, str):
            draw.text((left, top), part, "black", font)
            left += int(draw.textlength(part, font)) + edge // 2
        else:
            out.paste(part, (left, top))
            left += part.width + edge // 2
    return out


def stack(pages: Sequence[Image.Image]) -> Image.Image:
    """Pages below each other."""
    out = Image.new("RGB", (max(page.width for page in pages), sum(page.height for page in pages)), "white")
    top = 0
    for page in pages:
        out.paste(page, (0, top))
        top += page.height
    return out


def draw_mosaic(
    rows: Sequence[Sequence[np.ndarray | str]], titles: Sequence[str] | None = None, most: int = MOST_CELL
) -> Image.Image:
    """One picture of rows of pictures [h, w, 3] uint8 (or texts), with a title of a line or two above each column.

    Args:
        titles: None: the columns are an image, its heads and their mean.
        most: pixels of the longer side of a picture; a larger one is made smaller.
    """
    titles = titles or ["image", *(f"head {j}" for j in range(len(rows[0]) - 2)), "mean"]
    rows = [[cell if isinstance(cell, str) else fit_cell(cell, most) for cell in row] for row in rows]
    pictures = [[cell for cell in row if not isinstance(cell, str)] for row in rows]
    width = max(cell.shape[1] for row in pictures for cell in row)
    heights = [max(cell.shape[0] for cell in row) for row in pictures]
    line = max(12, width // 14)
    font, label = ImageFont.load_default(line), round(1.25 * line) * max(title.count("\n") + 1 for title in titles)
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
