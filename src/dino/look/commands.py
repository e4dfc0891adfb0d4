"""The commands that draw what a model sees: images in, pictures out.

An image of a folder that cannot be shown is skipped and named. An image that was named on the command line ends the command.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dino import weights
from dino.data.open import expand_images
from dino.data.sources import evenly_spaced
from dino.files import check_writable
from dino.look import drawing, pictures
from dino.look.attention import finer_patches
from dino.look.patches import BASIS_IMAGES, extract_patches, fit_axes
from dino.look.pictures import Fitted
from dino.look.video import Clip, Frame, video_frames, write_video
from dino.models import NO_ATTENTION, Backbone
from dino.options.commands import AttentionOptions, LookOptions, MatchOptions, PcaOptions, VideoOptions
from dino.terminal import say, track


def draw_attention(options: AttentionOptions) -> None:
    """Write `NAME-attention.png` (all maps and masks) and `NAME-head0.png`, ... for each image; panels if asked for."""
    model, looks = open_model(options, attention=True), []
    for stem, image in load_images(model, options):
        look = pictures.attention_maps(model, image, options.size, options.mass)
        drawing.save(look.figure(), f"{stem}-attention.png")
        for j, picture in enumerate(look.heated[:-1]):
            drawing.save(Image.fromarray(picture), f"{stem}-head{j}.png")
        print(f"{stem}-attention.png")
        if options.panel:
            pixels, photo = map(cut_square, image)
            looks.append(pictures.attention_maps(model, Fitted(pixels, drawing.fit_cell(photo)), options.size))
    pages = pictures.draw_panel(looks)
    for number, page in enumerate(pages, 1):
        path = f"{options.out}/panel{f'-{number}' if len(pages) > 1 else ''}.png"
        drawing.save(page, path)
        print(path)


def cut_square(picture: np.ndarray) -> np.ndarray:
    """The middle of a picture [h, w, 3]."""
    edge = min(picture.shape[:2])
    top, left = ((side - edge) // 2 for side in picture.shape[:2])
    return picture[top : top + edge, left : left + edge]


def draw_pca(options: PcaOptions) -> None:
    """Write `NAME-pca.png` for each image, all with the same basis of colors."""
    model = open_model(options)
    basis = fit_axes(extract_patches(model, image.pixels) for _, image in load_images(model, options, BASIS_IMAGES))
    for stem, image in load_images(model, options):
        drawing.save(pictures.color_patches(model, image, basis).figure(), f"{stem}-pca.png")
        print(f"{stem}-pca.png")


def draw_matches(options: MatchOptions) -> None:
    """Write one picture of two images with lines between their corresponding patches."""
    out = check_writable(options.out, ".png .jpg .webp", (options.a, options.b))
    found = pictures.match_patches(open_model(options), options.a, options.b, options.size)
    drawing.save(found.figure(options.lines), out)
    print(f"{out}: {min(options.lines, len(found.cosine))} of {len(found.cosine)} mutual nearest neighbors")


def draw_video(options: VideoOptions) -> None:
    """Write a clip that shows what the model sees in each frame of another clip."""
    clip = Clip(options.clip, options.fps)
    name = Path(options.clip).resolve().stem
    out = check_writable(options.out or f"{name}-{options.show}.mp4", ".mp4", (options.clip,))
    model = open_model(options, attention=options.show != "pca")
    frames = video_frames(model, clip, options.show, options.size, options.head, options.mass)
    drawn = (
        picture if options.alone else Frame(frame.seconds, np.concatenate([frame.pixels, picture.pixels], axis=1))
        for frame, picture in track(frames, clip.total, options.show)
    )
    print(f"{out}: {write_video(out, drawn)} frames")


# --- shared by the commands ----------------------------------------------------------------------------------------


def open_model(options: LookOptions, attention: bool = False) -> Backbone:
    """The model on its device, with patches of the stride that the options ask for.

    Raises:
        ValueError: `attention` is needed and it has none, or the size is not a multiple of its patches.
    """
    model = weights.take(options.model, options.device)
    if attention and not model.has_attention:
        raise ValueError(NO_ATTENTION)
    finer = model if options.stride is None else finer_patches(model, options.stride)
    pictures.choose_size(finer, options.size)  # refuses a wrong size now
    return finer


def load_images(model: Backbone, options: PcaOptions, most: int | None = None) -> Iterator[tuple[str, Fitted]]:
    """Of each image the path where its pictures go, without their suffix, and the image, fitted to whole patches.

    Args:
        most: only this many images, evenly spaced, and say nothing of those that cannot be shown. None: all.

    Raises:
        ValueError: an image that was named on the command line cannot be shown, or none can, or the folder cannot be
            written.
    """
    files = list(expand_images(options.images))
    folder = check_writable(f"{options.out}/NAME.png", ".png").parent
    names = distinguish_names([path for path, _ in files])
    chosen, done = evenly_spaced(len(files), most or len(files)), False
    for i in track(chosen, len(chosen), "images"):
        path, given = files[i]
        try:
            image = pictures.fit_image(model, path, options.size)
        except ValueError as error:
            if given or len(files) == 1:
                raise
            if most is None:
                say(f"Skipped {error}")
            continue
        done = True
        yield str(folder / names[i]), image
    if not done:
        raise ValueError(f"none of {len(chosen)} images can be shown, first {files[0][0]}; give others.")


def distinguish_names(paths: Sequence[str]) -> list[str]:
    """A name of its own for each of the absolute `paths`: the stem, with the folders or suffix too where others share it."""
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    relative = [os.path.relpath(path, root).replace(os.sep, "-") for path in paths]
    levels = [[Path(path).stem for path in paths], [os.path.splitext(name)[0] for name in relative], relative]
    chosen = levels[0]
    for level in levels[1:]:
        count = Counter(name.lower() for name in chosen)  # some file systems do not tell cases apart
        chosen = [new if count[old.lower()] > 1 else old for old, new in zip(chosen, level, strict=True)]
    count = Counter(name.lower() for name in chosen)
    return [f"{name}-{i}" if count[name.lower()] > 1 else name for i, name in enumerate(chosen)]
