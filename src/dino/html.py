"""HTML pages: Jinja2 templates filled with data. The templates escape every text that is put into them."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from dino import files
from dino.data.evaluation_views import resize_and_crop
from dino.data.sources import Source, read_or_gray

NUM_NEIGHBORS = 6  # shown of a query
EDGE = 224  # longest side of an embedded picture, pixels


class Neighbor(NamedTuple):
    """An image that was found for a query."""

    pixels: np.ndarray  # [s, s, 3] uint8
    name: str
    label: str | None
    cosine: float
    same: bool | None  # whether it has the query's label; None where one of them has no label


class NeighborRow(NamedTuple):
    """A query and what was found for it."""

    query: np.ndarray  # [s, s, 3] uint8
    caption: str
    neighbors: list[Neighbor]


def read_row(
    query: np.ndarray, caption: str, wanted: str | None, source: Source, found: Iterable[tuple[float, int]]
) -> NeighborRow:
    """A query with the images found for it, read from `source` and cropped to the query's size.

    Args:
        query: [s, s, 3] uint8; wanted: its label.
        found: cosine and position in `source` of each.
    """
    neighbors = []
    for cosine, position in found:
        label = get_label(source, position)
        same = None if wanted is None or label is None else label == wanted
        pixels = read_square(source, position, len(query))
        neighbors.append(Neighbor(pixels, source.name(position), label, cosine, same))
    return NeighborRow(query, caption, neighbors)


def read_square(source: Source, position: int, size: int = EDGE) -> np.ndarray:
    """The central square [size, size, 3] uint8 of an image, of a gray one if it can no longer be read."""
    return resize_and_crop(read_or_gray(source, position), size)


def get_label(source: Source, index: int) -> str | None:
    if source.labels is None or source.labels[index] < 0:
        return None
    return source.classes[source.labels[index]]


def format_cosines(cosines: Sequence[float]) -> list[str]:
    """With as many decimals, 3 to 6, as show that those below 1 are not 1: 0.9987 and 0.9991."""
    distance = min((1 - cosine for cosine in cosines if 1 - cosine > 1e-6), default=1)
    decimals = min(6, max(3, math.ceil(-math.log10(distance)) + 1))
    return [f"{cosine:.{decimals}f}" for cosine in cosines]


def encode_image(pixels: np.ndarray) -> str:
    """An image as a data URI: small ones exactly, larger ones as JPEG of at most EDGE pixels."""
    picture = Image.fromarray(pixels)
    small = max(picture.size) <= 64
    picture.thumbnail((EDGE, EDGE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True) if small else picture.save(file, "JPEG", quality=84)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"


ENVIRONMENT = Environment(
    loader=PackageLoader("dino"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
ENVIRONMENT.filters["encode_image"] = encode_image
ENVIRONMENT.filters["format_cosines"] = format_cosines


def render(template: str, **data: Any) -> Markup:
    """The HTML of templates/`template`.html.jinja with `data` in it."""
    return Markup(ENVIRONMENT.get_template(f"{template}.html.jinja").render(data))


def write_page(path: Path, title: str, kicker: str, top: Markup, sections: Mapping[str, Markup]) -> None:
    """Write a whole page: `top` under its title, then its `sections` by their titles."""
    text = render("page", title=title, kicker=kicker, top=top, sections=sections)
    # names of files need not be valid Unicode, but a page must be
    files.write(path, text.encode(errors="replace"))
