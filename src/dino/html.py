"""TODO."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from importlib import resources

import numpy as np
from PIL import Image

from dino.data.evaluation_views import resize_and_crop
from dino.data.sources import Source

NEIGHBORS = 6  # of a row


EDGE = 224  # longest side of an embedded picture, pixels


def get_label(source: Source, index: int) -> str | None:
    if source.labels is None or source.labels[index] < 0:
        return None
    return source.classes[source.labels[index]]


def draw_neighbors(
    square: np.ndarray, caption: str, wanted: str | None, source: Source, found: Sequence[tuple[float, int]]
) -> tuple[str, list[bool]]:
    """A query and the images of `source` found for it, as HTML; and which of those with a label share the query's.

    Args:
        square: the query, [s, s, 3] uint8; caption: HTML beneath it; wanted: its label.
        found: cosine and position in `source` of each.
    """
    tiles, ticks = draw_tile(square, caption, "whole"), []
    for value, position in found:
        label = get_label(source, position)
        mark = ""
        if wanted is not None and label is not None:
            ticks.append(label == wanted)
            mark = "same" if label == wanted else "other"
        text = f"{'&#10003; ' * (mark == 'same')}{escape(label or '')} <span>{value:.2f}</span>"
        tiles += draw_tile(resize_and_crop(source.read(position), len(square)), text, mark, source.name(position))
    return f'<div class="row seven">{tiles}</div>', ticks


def encode_image(pixels: np.ndarray) -> str:
    """An image as a data URI: small ones exactly, larger ones as JPEG of at most EDGE pixels."""
    picture = Image.fromarray(pixels)
    small = max(picture.size) <= 64
    picture.thumbnail((EDGE, EDGE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True) if small else picture.save(file, "JPEG", quality=84)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"


def draw_image(pixels: np.ndarray, alt: str, kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<img{name} src="{encode_image(pixels)}" alt="{escape(alt)}" title="{escape(alt)}" loading="lazy">'


def draw_tile(pixels: np.ndarray, caption: str, kind: str = "", alt: str = "") -> str:
    """A picture with a caption, which is HTML already."""
    return f'<figure class="{kind}">{draw_image(pixels, alt)}<figcaption>{caption}</figcaption></figure>'


ABOUT = (
    "DINO learns to see from images without labels. A student network looks at crops of an image and learns to answer "
    "as a teacher does that sees larger crops; the teacher is a running average of the student. What is kept is the "
    "teacher's backbone. (<cite>Emerging Properties in Self-Supervised Vision Transformers</cite>, Caron et al. 2021)"
)


def render_page(title: str, kicker: str, top: str, sections: dict[str, str]) -> str:
    """A whole page from the HTML `top` under its title and of its `sections`, by title."""
    style = resources.files("dino.report").joinpath("style.css").read_text(encoding="utf-8")
    links = "".join(f'<a href="#s{i}">{escape(name)}</a>' for i, name in enumerate(sections))
    body = "".join(
        f'<section id="s{i}"><h2>{escape(name)}</h2>{html}</section>' for i, (name, html) in enumerate(sections.items())
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} - {kicker}</title><style>{style}</style></head><body>"
        f'<header><p class="kicker">{kicker}</p><h1>{escape(title)}</h1>{top}'
        f"<nav>{links}</nav></header><main>{body}</main><footer><p>{ABOUT}</p></footer></body></html>\n"
    )
