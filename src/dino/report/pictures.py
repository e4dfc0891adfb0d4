"""Pictures of where a model looks: the maps and masks of each head, for the report and as files of their own.

The picture of a map shows each patch as a square of its own (nothing is smoothed), black where a head does not look
and bright where it looks most. A mask keeps the picture where most of a head's attention lies and dims the rest.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from dino.data.decode import BadImage, decode
from dino.data.render import normalise
from dino.data.sources import open_source
from dino.inference.attention import cls_attention, enlarge, fit, mass_mask
from dino.models import NO_ATTENTION, Backbone

MOST_PATCHES = 2**15  # of one image; the work grows with their square, and here a CPU needs minutes
GUTTER = 6  # pixels between the pictures of a sheet
PATIENCE = 2  # seconds before there is a progress bar


class Look(NamedTuple):
    """One image and where the model looks in it; pictures are [h, w, 3] uint8, a head each and their mean last."""

    image: np.ndarray
    maps: list[np.ndarray]
    overlays: list[np.ndarray]
    masks: Tensor  # bool [heads + 1, h, w], on the CPU


def look(model: Backbone, image: np.ndarray, mass: float, device: torch.device | str) -> Look:
    """Where [CLS] looks in `image` [h, w, 3] uint8, whose sides are multiples of the patch size.

    Raises:
        ValueError: the image has more patches than time should be spent on.
    """
    height, width = image.shape[:2]
    patches = math.prod(model.grid(height, width))
    if patches > MOST_PATCHES:
        raise ValueError(
            f"at {width} x {height} pixels it has {patches:,} patches, more than {MOST_PATCHES:,}, which would take "
            "very long; use a smaller --size."
        )
    pixels = torch.from_numpy(np.array(image))[None, None].to(device)
    attention = cls_attention(model, normalise(pixels, model.in_channels)).float().cpu()[0]
    attention = torch.cat([attention, attention.mean(dim=0, keepdim=True)])
    maps = enlarge(attention[None], (height, width))[0]
    masks = enlarge(mass_mask(attention, mass)[None], (height, width))[0] > 0
    return Look(image, [heat(m.numpy()) for m in maps], [dim_outside(image, m.numpy()) for m in masks], masks)


def heat(values: np.ndarray) -> np.ndarray:
    """A map [h, w] of numbers from 0 up as colours, [h, w, 3] uint8."""
    share = values / max(float(values.max()), 1e-12)
    return (colormaps["inferno"](share)[..., :3] * 255 + 0.5).astype(np.uint8)


def dim_outside(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`image` where `mask` holds; elsewhere a dark grey shade of it."""
    shade = image.mean(axis=-1, keepdims=True) * 0.25 + 12
    return np.where(mask[..., None], image, shade).astype(np.uint8)


def sheet(shown: Look, mass: float) -> Image.Image:
    """All of one `Look` in a row: the image, the heads' maps and their mean, with the masks beneath."""
    height, width = shown.image.shape[:2]
    heads = len(shown.maps) - 1
    label = max(12, width // 14)
    font = ImageFont.load_default(label)
    size = GUTTER + (heads + 2) * (width + GUTTER), GUTTER + label + 2 * (GUTTER + height) + GUTTER
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    titles = ["image", *(f"head {j}" for j in range(heads)), "mean"]
    for column, title in enumerate(titles):
        left, top = GUTTER + column * (width + GUTTER), GUTTER
        draw.text((left, top), title, "black", font)
        top += label + GUTTER
        upper = shown.image if column == 0 else shown.maps[column - 1]
        page.paste(Image.fromarray(upper), (left, top))
        top += height + GUTTER
        if column:
            page.paste(Image.fromarray(shown.overlays[column - 1]), (left, top))
        else:
            draw.text((left, top), f"{100 * mass:g} % of the\nattention", "black", font)
    return page


def write_attention(
    model: Backbone, images: Sequence[str], out: Path, size: int, mass: float, device: torch.device | str
) -> list[Path]:
    """Write `NAME-attention.png` (`sheet`) and `NAME-head0.png`, ... (maps) for each image; return the files.

    NAME is the image's own, with as much of its path as it takes to tell the images apart.

    Args:
        images: image files, and folders or lists of them. What cannot be read in a folder is skipped and named.
        size: edge the image's shorter side is resized to, pixels.
        mass: share of the attention that the masks keep.

    Raises:
        ValueError: an image is missing, unreadable or too small, or `out` cannot be written.
    """
    mass_mask(torch.ones(1, 1), mass)  # refuses a wrong share before any work
    if not model.has_attention:
        raise ValueError(NO_ATTENTION)
    if size % model.patch_size:
        raise ValueError(f"--size is {size}, not a multiple of the patch size {model.patch_size}.")
    files = list(_expand(images))
    written: list[Path] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for (path, given), name in zip(_watched(files), names([path for path, _ in files]), strict=True):
            try:
                shown = look(model, fit(decode(path), size, model.patch_size), mass, device)
            except (BadImage, ValueError) as error:
                if given or len(files) == 1:
                    raise ValueError(f"{path} cannot be shown: {error}") from error
                print(f"Skipped {path}: {error}", file=sys.stderr)
                continue
            written += _save(shown, out, name, mass)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written ({error.strerror or error}); choose another --out.") from error
    if not written:
        raise ValueError(f"none of the {len(files)} images in {', '.join(images)} can be read.")
    return written


def _save(shown: Look, out: Path, name: str, mass: float) -> list[Path]:
    pictures = {"attention": sheet(shown, mass)}
    pictures |= {f"head{j}": Image.fromarray(picture) for j, picture in enumerate(shown.maps[:-1])}
    paths = []
    for kind, picture in pictures.items():
        paths.append(out / f"{name}-{kind}.png")
        picture.save(paths[-1])
    return paths


def _expand(images: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Each image once, as an absolute path, and whether it was named itself rather than found in a folder."""
    found: dict[str, bool] = {}
    for spec in images:
        path = os.path.abspath(os.path.expanduser(spec))
        if os.path.isdir(path) or path.lower().endswith((".txt", ".csv")):
            source = open_source(spec, labels="none")
            for i in range(len(source)):
                found.setdefault(os.path.normpath(os.path.join(source.root, source.name(i))), False)
        elif not os.path.exists(path):
            raise ValueError(f"there is no image '{spec}'; check the path.")
        else:
            found[path] = True
    if not found:
        raise ValueError("no image was given; name image files or folders.")
    yield from found.items()


def names(paths: Sequence[str]) -> list[str]:
    """A different name for each of the absolute `paths`: the stem, or with folders, or with the suffix too."""
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    relative = [os.path.relpath(path, root).replace(os.sep, "-") for path in paths]
    levels = [[Path(path).stem for path in paths], [os.path.splitext(name)[0] for name in relative], relative]
    chosen = levels[0]
    for level in levels[1:]:
        count = Counter(name.lower() for name in chosen)  # some file systems do not tell cases apart
        chosen = [new if count[old.lower()] > 1 else old for old, new in zip(chosen, level, strict=True)]
    count = Counter(name.lower() for name in chosen)
    return [f"{name}-{i}" if count[name.lower()] > 1 else name for i, name in enumerate(chosen)]


def _watched(files: list[tuple[str, bool]]) -> Iterable[tuple[str, bool]]:
    """`files`, with a progress bar on the terminal once they have taken a while."""
    bar = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    task, started = bar.add_task("attention", total=len(files)), time.monotonic()
    try:
        for done, file in enumerate(files):
            if time.monotonic() - started > PATIENCE:
                bar.start()
            bar.update(task, completed=done)
            yield file
    finally:
        if bar.live.is_started:
            bar.stop()
