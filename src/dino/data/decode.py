"""Image files as arrays: [height, width, 3] uint8 RGB, upright, or one short reason why not.

Whatever a file holds, `decode` returns an array or raises `BadImage`: one broken file among millions must not end a
run. Only six formats are tried, so that no file reaches a rarely tested parser (PostScript, fonts).
Pillow reads the header. The pixels of a faultless JPEG, the most common case, come from simplejpeg: it uses the same
library (libjpeg-turbo), gives the same pixels, and takes three quarters of Pillow's time, because it stores three bytes a
pixel and not four. Transparent images are composited on white: cut-outs and logos are made to be seen on a page, and the
colors stored under transparent pixels are arbitrary.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
MAX_PIXELS = 178_956_970  # Pillow's own limit: 512 MB as 8-bit RGB

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"GIF8")
_READ_WHOLE = 2**26  # bytes. Larger files are read in parts: Pillow may need only the beginning
ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(Exception):
    """An image that cannot be used; `reason` is one short clause such as "empty file" or "truncated"."""

    def __init__(self, reason: str):
        super().__init__(reason)  # with one argument only, the exception can be pickled by a worker process
        self.reason = reason


def decode(file: str | Path | bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The image in a file (a path) or in memory (bytes), first frame, turned upright by its EXIF orientation.

    8-bit colors are kept as stored (no color management). 16-bit gray keeps its full range, 0..65535 to 0..255;
    32-bit integer and float gray have no agreed range and are stretched from their smallest to their largest value.

    Returns a writable, contiguous [h, w, 3] uint8 array.
    Raises BadImage, and nothing else, when there is no usable image. An image of more than `max_pixels` is refused
    before its pixels are decoded (Pillow's own limit, twice `PIL.Image.MAX_IMAGE_PIXELS`, holds as well).
    """
    try:
        # Filters are global to all threads. If two threads restore them in the wrong order, only Pillow stays silent.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            with io.BytesIO(file) if isinstance(file, bytes) else open_file(file) as stream:
                return _pixels(stream, max_pixels)
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds of error
        raise BadImage(_reason(error)) from error


def open_file(path: str | Path) -> BinaryIO:
    """A regular file, in memory unless it is huge."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for a writer
        raise BadImage("not a regular file")
    if status.st_size > _READ_WHOLE:
        return open(path, "rb")
    with open(path, "rb", buffering=0) as file:
        return io.BytesIO(file.read())


def _pixels(stream: BinaryIO, max_pixels: int) -> np.ndarray:
    try:
        image = Image.open(stream, formats=_FORMATS)
    except UnidentifiedImageError as error:
        stream.seek(0)
        head = stream.read(8)
        kind = "damaged header" if head.startswith(_MAGIC) else "not an image (JPEG, PNG, WebP, BMP, TIFF or GIF)"
        raise BadImage(kind if head else "empty file") from error
    with image:
        if image.width * image.height > max_pixels:
            raise BadImage(f"too many pixels ({image.width} x {image.height}, limit {max_pixels})")
        pixels = _faultless_jpeg(image, stream)
        if pixels is None:
            image.load()  # some formats store their EXIF after the pixels
        turn = _turn(image)
        if pixels is not None and turn is None:
            return pixels
        upright = _rgb(image) if pixels is None else Image.fromarray(pixels)
        return np.array(upright if turn is None else upright.transpose(turn))


def _faultless_jpeg(image: Image.Image, stream: BinaryIO) -> np.ndarray | None:
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or not isinstance(stream, io.BytesIO):
        return None
    try:
        return simplejpeg.decode_jpeg(stream.getvalue(), "RGB", strict=True)
    except ValueError:  # Pillow decides whether the fault matters, and names it
        return None


def _turn(image: Image.Image) -> Image.Transpose | None:
    info = image.info  # looked at first, because getexif() is slow. Pillow turns TIFF itself
    if not ("exif" in info or "xmp" in info or "XML:com.adobe.xmp" in info or "Raw profile type exif" in info):
        return None
    try:
        return _UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF; take the pixels as they are
        return None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return _gray16(image)
    if image.mode in ("I", "F"):
        return _stretch(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    page = Image.new("RGB", image.size, "white")
    page.paste(image, mask=image.getchannel("A"))
    return page


def _gray16(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.uint32)
    gray = ((values + 128) // 257).astype(np.uint8)
    clear = image.info.get("transparency")  # the gray value of transparent pixels
    if isinstance(clear, int):
        gray[values == clear] = 255
    return Image.fromarray(gray).convert("RGB")


def _stretch(image: Image.Image) -> Image.Image:
    with np.errstate(all="ignore"):  # casting a signaling NaN warns
        values = np.asarray(image).astype(np.float64)
        finite = np.isfinite(values)
        if not finite.any():
            raise BadImage("no finite pixel")
        low, high = values[finite].min(), values[finite].max()
        values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
        gray = np.rint((values - low) * (255 / ((high - low) or 1.0)))
    return Image.fromarray(gray.astype(np.uint8)).convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:  # from the file system
        return error.strerror.lower()
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels (over Pillow's limit)"
    if isinstance(error, MemoryError):
        return "too large for memory"
    text = " ".join(str(error).split())
    if isinstance(error, EOFError) or "truncated" in text.lower() or "end of file" in text.lower():
        return "truncated"
    return f"damaged ({type(error).__name__}: {text[:80]})"
