"""Clips in and out: frames of a video, an animated GIF or a folder of images; H.264 that every browser plays.

And what a model sees in each frame.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from dino import errors, files
from dino.data.decode import BadImage
from dino.data.image_files import open_source
from dino.look.patches import BASIS_IMAGES, extract_patches, fit_axes
from dino.look.pictures import AnyModel, attention_maps, color_patches, fit_image
from dino.options.commands import VideoOptions
from dino.options.rules import checked
from dino.terminal import say
from dino.weights import take

TICK = Fraction(1, 90_000)  # seconds; the usual clock of video, fine enough for every frame rate

T = TypeVar("T")


class Frame(NamedTuple):
    seconds: float  # since the clip's start
    pixels: np.ndarray  # [h, w, 3] uint8


def import_pyav() -> Any:
    return errors.import_optional("av", "video needs PyAV", "video")


class Clip:
    """The frames of a video file, or of a folder of images in the order of their names ("9.png" before "10.png").

    It can be iterated over several times, and holds one frame in memory.

    Args:
        fps: frames per second of a folder; video files state their own.

    Raises:
        ValueError: it does not exist, is no video, holds no frame, or frames differ in size.
    """

    def __init__(self, path: str | Path, fps: float = 24.0):
        if fps <= 0:
            raise ValueError(f"fps is {fps}; it must be above 0.")
        self.path, self.fps = str(path), fps
        self.folder = open_source(self.path, "none") if os.path.isdir(path) else None
        self.total = len(self.folder) if self.folder else self._open().streams.video[0].frames or None  # None: unknown

    def __iter__(self) -> Iterator[Frame]:
        shape, last = None, -1.0
        for seconds, pixels in self._images() if self.folder else self._decoded():
            if shape is not None and shape != pixels.shape:
                sizes = " and ".join(f"{width} x {height}" for height, width, _ in (shape, pixels.shape))
                raise ValueError(f"{self.path} has frames of {sizes} pixels; make all of one size.")
            shape, last = pixels.shape, max(seconds, last + 1e-3)  # damaged clips repeat a time
            yield Frame(last, pixels)
        if shape is None:
            raise ValueError(f"{self.path} holds no frame that can be read; give another clip.")

    def _images(self) -> Iterator[tuple[float, np.ndarray]]:
        assert self.folder is not None
        parts = [re.split(r"(\d+)", self.folder.name(i)) for i in range(len(self.folder))]  # text, number, text, ...
        keys = [[int(part) if odd % 2 else part for odd, part in enumerate(name)] for name in parts]
        for place, i in enumerate(sorted(range(len(keys)), key=keys.__getitem__)):
            try:
                yield place / self.fps, self.folder.read(i)
            except BadImage as error:
                say(f"Skipped {self.folder.name(i)}: {error}")

    def _open(self) -> Any:
        try:
            container = import_pyav().open(self.path)
        except import_pyav().error.FFmpegError as error:
            raise ValueError(f"{self.path} cannot be read as a video ({error.strerror}).") from error
        if not container.streams.video:
            raise ValueError(
                f"{self.path} holds no video, only {container.format.long_name}; give a clip with pictures."
            )
        return container

    def _decoded(self) -> Iterator[tuple[float, np.ndarray]]:
        with self._open() as container:
            stream, start = container.streams.video[0], None
            stream.thread_type = "AUTO"
            step, seconds = 1 / float(stream.average_rate or 25), 0.0
            try:
                for frame in container.decode(stream):
                    seconds = seconds + step if frame.time is None else frame.time
                    start = seconds if start is None else start
                    # Phones film sideways and note the rotation.
                    yield seconds - start, np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
            except import_pyav().error.FFmpegError as error:
                say(f"{self.path} cannot be read beyond {seconds:.1f} s ({error.strerror}).")


def thin_out(items: Iterable[T], most: int) -> list[T]:
    """At most `most` of the items, evenly spaced; their number need not be known beforehand."""
    kept, step = [], 1
    for i, item in enumerate(items):
        if i % step == 0:
            kept.append(item)
        if len(kept) > most:
            kept, step = kept[::2], 2 * step
    return kept


def write_video(out: Path, frames: Iterable[Frame]) -> int:
    """Write `frames` of one size as H.264 in MP4, without sound, and return their number; all or nothing.

    Raises:
        WriteError: it cannot be written.
    """
    av, count = import_pyav(), 0
    with (
        files.replacing(out) as temporary,  # plays while it loads:
        av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container,
    ):
        stream = container.add_stream("libx264", options={"crf": "18"})
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", TICK  # what all browsers play
        for seconds, pixels in frames:
            if not count:
                stream.height, stream.width = (edge // 2 * 2 for edge in pixels.shape[:2])  # a color is of 2 x 2
            picture = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(pixels[: stream.height, : stream.width]), format="rgb24"
            )
            picture.pts, picture.time_base = round(seconds / TICK), TICK
            container.mux(stream.encode(picture))
            count += 1
        container.mux(stream.encode())
    return count


@checked(VideoOptions, "show", "size", "head", "mass")
def video_frames(
    model: AnyModel,
    clip: str | Path | Clip,
    show: Literal["attention", "mask", "pca"] = "attention",
    size: int | None = None,
    head: int | None = None,
    mass: float = 0.6,
) -> Iterator[tuple[Frame, Frame]]:
    """Yield each frame of `clip`, trimmed to whole patches, and its picture; `write_video` takes them.

    Args:
        clip: a video file, an animated GIF, or a folder of frames.
        show: the frame under the map of attention, or within its mask; or patch features as colors, on one basis.
        head: the head whose attention is shown. None: the mean of all.
        model, size, mass: see `attention_maps`.
    """
    model, clip = take(model), clip if isinstance(clip, Clip) else Clip(clip)
    basis = None
    if show == "pca":
        some = thin_out((fit_image(model, frame, size).pixels for _, frame in clip), BASIS_IMAGES)
        basis = fit_axes(extract_patches(model, frame) for frame in some)
    for seconds, frame in clip:
        if basis is not None:
            drawn = color_patches(model, fit_image(model, frame, size), basis)
            picture = drawn.picture
        else:
            drawn = attention_maps(model, frame, size, mass).only(head)
            (picture,) = drawn.heated if show == "attention" else drawn.overlays
        yield Frame(seconds, drawn.photo), Frame(seconds, picture)
