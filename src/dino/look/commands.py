"""The commands that look at what a model sees: images in, pictures out.

An image of a folder that cannot be shown is skipped and named; one that was given by its own name ends the command.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dino import distributed, weights
from dino.data.open import expand_images
from dino.data.sources import evenly_spaced
from dino.files import check_writable
from dino.look.attention import finer_patches
from dino.look.patches import BASIS_IMAGES, compute_axes
from dino.look.pictures import (
    attention_maps,
    choose_size,
    color_patches,
    draw_panel,
    fit_image,
    match_patches,
    video_frames,
)
from dino.look.video import Clip, Frame, write_video
from dino.models import NO_ATTENTION, Backbone
from dino.options.commands import AttentionOptions, LookOptions, MatchOptions, PcaOptions, VideoOptions
from dino.terminal import track


def attention(options: AttentionOptions) -> None:
    """Write `NAME-attention.png` (all maps and masks) and `NAME-head0.png`, ... for each image; a panel if asked for."""
    model, rows = open_model(options, attention=True), []
    for stem, pixels in load_images(model, options):
        look = attention_maps(model, pixels, options.size, options.mass)
        look.figure().save(f"{stem}-attention.png")
        for j, picture in enumerate(look.maps[:-1]):
            Image.fromarray(picture).save(f"{stem}-head{j}.png")
        print(f"{stem}-attention.png")
        if options.panel:
            edge = min(pixels.shape[:2])
            top, left = ((side - edge) // 2 for side in pixels.shape[:2])
            rows.append(attention_maps(model, pixels[top : top + edge, left : left + edge], options.size))
    if rows:
        draw_panel(rows).save(f"{options.out}/panel.png")
        print(f"{options.out}/panel.png")


def pca(options: PcaOptions) -> None:
    """Write `NAME-pca.png` for each image, on one basis for all of them."""
    model = open_model(options)
    basis = compute_axes(model, (pixels for _, pixels in load_images(model, options, BASIS_IMAGES)))
    for stem, pixels in load_images(model, options):
        color_patches(model, pixels, basis).figure().save(f"{stem}-pca.png")
        print(f"{stem}-pca.png")


def match(options: MatchOptions) -> None:
    """Write one picture of two images with lines between their corresponding patches."""
    out = check_writable(options.out, ".png .jpg .webp", (options.a, options.b))
    found = match_patches(open_model(options), options.a, options.b, options.size)
    found.figure(options.lines).save(out)
    print(f"{out}: {min(options.lines, len(found.cosine))} of {len(found.cosine)} mutual nearest neighbors")


def video(options: VideoOptions) -> None:
    """Write a clip of what the model sees in each frame of another."""
    clip = Clip(options.clip, options.fps)
    name = Path(options.clip).resolve().stem
    out = check_writable(options.out or f"{name}-{options.show}.mp4", ".mp4", (options.clip,))
    model = open_model(options, attention=options.show != "pca")
    frames = video_frames(model, clip, options.show, options.size, options.head, options.mass)
    pictures = (
        picture if options.alone else Frame(frame.seconds, np.concatenate([frame.pixels, picture.pixels], axis=1))
        for frame, picture in track(frames, clip.total, options.show)
    )
    print(f"{out}: {write_video(out, pictures)} frames")


# --- what they share -----------------------------------------------------------------------------------------------


def open_model(options: LookOptions, attention: bool = False) -> Backbone:
    """The model, on its device and with its patches as the options want them.

    Raises:
        ValueError: it has no `attention`, or the size does not suit it.
    """
    model = weights.load(options.model).to(distributed.start(options.device))
    if attention and not model.has_attention:
        raise ValueError(NO_ATTENTION)
    finer = model if options.stride is None else finer_patches(model, options.stride)
    choose_size(finer, options.size)
    return finer


def load_images(model: Backbone, options: PcaOptions, most: int | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """What to call the pictures of each image, less what they show, and its pixels, fitted to whole patches.

    A name is the image's own, with as much of its path as it takes to tell the images apart.

    Args:
        most: look at this many alone, evenly spaced, and leave it to the next time to name what cannot be shown.

    Raises:
        ValueError: an image that was named itself cannot be shown, or none can, or the folder cannot be written.
    """
    files = list(expand_images(options.images))
    stems = [
        str(check_writable(f"{options.out}/NAME.png", ".png").with_name(name))
        for name in distinguish_names([path for path, _ in files])
    ]
    chosen, done = evenly_spaced(len(files), most or len(files)), False
    for i in track(chosen, len(chosen), "images"):
        path, given = files[i]
        try:
            pixels = fit_image(model, path, options.size)
        except ValueError as error:
            if given or len(files) == 1:
                raise
            if most is None:
                print(f"Skipped {error}", file=sys.stderr)
            continue
        done = True
        yield stems[i], pixels
    if not done:
        raise ValueError(f"none of {len(chosen)} images can be shown, first {files[0][0]}; give others.")


def distinguish_names(paths: Sequence[str]) -> list[str]:
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
