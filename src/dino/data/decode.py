"""Image files as arrays: [height, width, 3] uint8 RGB, upright, or one short reason why not.

Whatever a file holds, `decode` returns an array or raises `BadImage`: one broken file among millions must not end a
run. Only the formats of `_FORMATS` are tried, so that no file reaches a rarely tested parser (PostScript, fonts).
Pillow reads the header. The pixels of a faultless JPEG, the most common case, come from simplejpeg: it uses the same
library (libjpeg-turbo), gives the same pixels, and takes three quarters of Pillow's time, because it stores three bytes a
pixel and not four. Transparent images are composited on white: cut-outs and logos are made to be seen on a page, and the
colors stored under transparent pixels are arbitrary.

Memory: about 7 bytes a pixel (Pillow's 4 and the result), 3 for JPEG, 9 for AVIF, 16 for WebP; twice the result where an
image is turned. What is converted, is converted in bands of rows.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageFile, PngImagePlugin, features

HEIF_SUFFIXES, AVIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"}), frozenset({".avif"})
IMAGE_SUFFIXES = (
    frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
    | (AVIF_SUFFIXES if "avif" in features.modules and features.check_module("avif") else frozenset())
    | (HEIF_SUFFIXES if importlib.util.find_spec("pillow_heif") else frozenset())
)
ORIENTATION = 0x0112  # EXIF tag

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_READ_WHOLE = 2**26  # bytes. Larger files are read in parts: Pillow may need only the beginning
_MAX_PIXELS = 178_956_970  # Pillow's own limit: 512 MB as 8-bit RGB
_BAND = 2**20  # pixels that are converted at a time
# By EXIF orientation: whether rows become columns, then how OpenCV flips (0: top and bottom, 1: left and right, -1: both).
_UPRIGHT = {2: (False, 1), 3: (False, -1), 4: (False, 0), 5: (True, None), 6: (True, 1), 7: (True, -1), 8: (True, 0)}
# What decoders say of a kind of file that they do not know, which may be in perfect order.
_UNSUPPORTED = ("unsupported", "unknown pixel mode", "unknown data organization", "cannot handle", "not supported")

# Pillow refuses a PNG file for 1 MB of text or color profile. Editors and image generators write more.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**26


class BadImage(Exception):
    """An image that cannot be used; `reason` is one short clause such as "empty file" or "truncated"."""

    def __init__(self, reason: str):
        super().__init__(reason)  # with one argument only, the exception can be pickled by a worker process
        self.reason = reason


def decode(file: str | Path | bytes, max_pixels: int | None = None) -> np.ndarray:
    """The image in a file (a path) or in memory (bytes), first frame, turned upright by its EXIF orientation.

    8-bit colors are kept as stored (no color management). 16-bit gray keeps its full range, 0..65535 to 0..255;
    32-bit integer and float gray have no agreed range and are stretched from their smallest to their largest value.

    Returns a writable, contiguous [h, w, 3] uint8 array.
    Raises BadImage, and nothing else, when there is no usable image. An image of more than `max_pixels` (None:
    $DINO_MAX_PIXELS, or 178,956,970 as in Pillow) is refused before its pixels are decoded.
    """
    kind = "file"
    try:
        # Filters are global to all threads. If two threads restore them in the wrong order, only Pillow stays silent.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            with io.BytesIO(file) if isinstance(file, bytes) else open_file(file) as stream:
                kind, factory = _recognize(stream)
                with factory(stream, "") as image:
                    return _pixels(image, stream, max_pixels)
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds of error
        raise BadImage(_reason(error, kind)) from error


def open_file(path: str | Path) -> BinaryIO:
    """A regular file, in memory unless it is huge."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for a writer
        raise BadImage("not a regular file")
    if status.st_size > _READ_WHOLE:
        return open(path, "rb")
    with open(path, "rb", buffering=0) as file:
        return io.BytesIO(file.read())


def _recognize(stream: BinaryIO) -> tuple[str, Callable[[BinaryIO, str], ImageFile.ImageFile]]:
    """The format of a file by its first bytes, and Pillow's class for it."""
    head = stream.read(64)
    stream.seek(0)
    if not head:
        raise BadImage("empty file")
    Image.init()
    for kind in _FORMATS:
        factory, accepts = Image.OPEN[kind]
        if accepts is not None and accepts(head) is True:
            return kind, factory
    if head[4:8] == b"ftyp" and (b"avif" in head or b"avis" in head):
        if not AVIF_SUFFIXES <= IMAGE_SUFFIXES:
            raise BadImage("AVIF, which this Pillow cannot read: pip install -U pillow")
        return "AVIF", Image.OPEN["AVIF"][0]
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
        if not HEIF_SUFFIXES <= IMAGE_SUFFIXES:
            raise BadImage("HEIC, to be read after: pip install 'dino-vision[heif]'")
        from pillow_heif import HeifImageFile

        return "HEIC", HeifImageFile
    raise BadImage("not an image (JPEG, PNG, WebP, BMP, TIFF or GIF)")


def _pixels(image: ImageFile.ImageFile, stream: BinaryIO, max_pixels: int | None) -> np.ndarray:
    most = os.environ.get("DINO_MAX_PIXELS") or _MAX_PIXELS if max_pixels is None else max_pixels
    if not str(most).isdecimal():
        raise BadImage(f"DINO_MAX_PIXELS is {most}, which is no number of pixels")
    if image.width * image.height > int(most):
        how = ", which DINO_MAX_PIXELS sets" if max_pixels is None else ""
        raise BadImage(f"too many pixels ({image.width} x {image.height}, limit {most}{how})")
    pixels = _faultless_jpeg(image, stream)
    if pixels is None:
        image.load()  # some formats store their EXIF after the pixels
        pixels = to_rgb(image)
    swap, flip = _turn(image)
    if swap:
        pixels = cv2.transpose(pixels)
    return pixels if flip is None else cv2.flip(pixels, flip)


def _faultless_jpeg(image: Image.Image, stream: BinaryIO) -> np.ndarray | None:
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or not isinstance(stream, io.BytesIO):
        return None
    try:
        return simplejpeg.decode_jpeg(stream.getvalue(), "RGB", strict=True)
    except ValueError:  # Pillow decides whether the fault matters, and names it
        return None


def _turn(image: Image.Image) -> tuple[bool, int | None]:
    """An entry of `_UPRIGHT`."""
    as_it_is = False, None
    info = image.info  # looked at first, because getexif() is slow. Pillow turns TIFF itself
    if not ("exif" in info or "xmp" in info or "XML:com.adobe.xmp" in info or "Raw profile type exif" in info):
        return as_it_is
    try:
        return _UPRIGHT.get(image.getexif().get(ORIENTATION, 1), as_it_is)
    except Exception:  # damaged EXIF; take the pixels as they are
        return as_it_is


def to_rgb(image: Image.Image) -> np.ndarray:
    """[h, w, 3] uint8."""
    pixels, convert = np.empty((image.height, image.width, 3), np.uint8), _drop_alpha
    if image.mode in ("I", "F"):
        convert = _stretch(image)
    elif image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(258)  # of a TIFF
        convert = functools.partial(_gray, white=4095 if bits == (12,) else 65535)
    for rows, band in _bands(image):
        pixels[rows] = convert(band)
    return pixels


def _bands(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """The image in parts of some rows."""
    step = max(1, _BAND // image.width)
    if step >= image.height:
        yield slice(None), image
        return
    for top in range(0, image.height, step):
        end = min(top + step, image.height)
        yield slice(top, end), image.crop((0, top, image.width, end))


def _drop_alpha(image: Image.Image) -> np.ndarray:
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    image = image.convert("RGBA")
    page = Image.new("RGB", image.size, "white")
    page.paste(image, mask=image.getchannel("A"))
    return np.asarray(page)


def _gray(image: Image.Image, white: int) -> np.ndarray:
    values = np.asarray(image).astype(np.uint32)
    gray = (values * 255 + white // 2) // white
    clear = image.info.get("transparency")  # the gray value of transparent pixels
    if isinstance(clear, int):
        gray[values == clear] = 255
    return gray[..., None]


def _stretch(image: Image.Image) -> Callable[[Image.Image], np.ndarray]:
    """What makes a band's values 0 to 255."""
    low, high = np.inf, -np.inf
    with np.errstate(all="ignore"):  # casting a signaling NaN warns
        for _, band in _bands(image):
            values = np.asarray(band)
            finite = values[np.isfinite(values)]
            if finite.size:
                low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    if low > high:
        raise BadImage("no finite pixel")

    def convert(band: Image.Image) -> np.ndarray:
        with np.errstate(all="ignore"):
            values = np.nan_to_num(np.asarray(band).astype(np.float64), nan=low, posinf=high, neginf=low)
            return np.rint((values - low) * (255 / ((high - low) or 1.0)))[..., None]

    return convert


def _reason(error: Exception, kind: str) -> str:
    if isinstance(error, OSError) and error.strerror:  # from the file system
        return error.strerror.lower()
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels (over Pillow's limit)"
    if isinstance(error, MemoryError):
        return "too large for memory"
    text = " ".join(str(error).split())
    if "MAX_TEXT" in text:
        return "more than 64 MB of text in it"
    advice = f"an unsupported kind of {kind}: convert it to 8-bit color"
    if isinstance(error, EOFError) or "truncated" in text.lower() or "end of file" in text.lower():
        return f"truncated (or {advice})" if kind == "TIFF" else "truncated"
    if any(words in text.lower() for words in _UNSUPPORTED):
        return f"{advice} ({text[:40]})"
    what = f"{type(error).__name__}: {text[:60]}"
    return f"damaged ({what}), or {advice}" if kind == "TIFF" and "decoder error" in text else f"damaged ({what})"
