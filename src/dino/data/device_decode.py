"""JPEG files that the device decodes (`--data.decode device`): a worker passes on their bytes and reads only the headers.

A worker still decodes every image that a device cannot decode, or might decode to other pixels than `dino.data.decode`:
other formats, other colors than YCbCr and gray, images to be turned upright, files that are cut off.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino import errors
from dino.data.decode import ORIENTATION
from dino.data.sources import Source, read_bytes


class Undecodable(Exception):
    """The device cannot decode a batch. It does not say which image is at fault."""


class Jpeg(NamedTuple):
    """A file's bytes and the shape [h, w, 3] of what they decode to."""

    data: bytes
    shape: tuple[int, int, int]


def check_device(device: torch.device) -> None:
    """Decode a tiny image on `device`.

    Raises:
        ValueError: the device cannot decode.
    """
    if device.type != "cuda":
        raise ValueError("data.decode is device, but the device is the CPU; use --data.decode workers.")
    stream = io.BytesIO()
    Image.new("RGB", (2, 2)).save(stream, "JPEG")
    try:
        errors.import_optional("torchcodec.decoders", "data.decode device needs TorchCodec", "gpu")
        decode_jpegs([torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)], [(2, 2)], device)
    except (Undecodable, RuntimeError, OSError) as error:  # the last two: a library cannot be loaded
        raise ValueError(
            f"data.decode is device, but this TorchCodec cannot decode on it ({errors.first_line(error)}); install its "
            "build for CUDA, or use --data.decode workers."
        ) from error


def read_jpeg(source: Source, index: int, largest: int) -> np.ndarray | Jpeg:
    """The image at `index`, as a `Jpeg` if a device can decode it and neither edge is above `largest` pixels.

    Raises:
        BadImage: there is no usable image.
    """
    try:
        data = read_bytes(source, index)
        jpeg = None if data is None else _parse_jpeg(data)
    except Exception:  # reading it in full names the fault
        jpeg = None
    return jpeg if jpeg is not None and max(jpeg.shape) <= largest else source.read(index)


def _parse_jpeg(data: bytes) -> Jpeg | None:
    """A file, if a device makes the same pixels of it as `dino.data.decode`."""
    if not (data.startswith(b"\xff\xd8") and data.endswith(b"\xff\xd9")):
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
        upright = image.getexif().get(ORIENTATION, 1) == 1 if {"exif", "xmp"} & image.info.keys() else True
    stored = {"L": [1], "RGB": [1, 2, 3]}  # component numbers of gray, and of Y, Cb and Cr
    usual = [component[0] for component in getattr(image, "layer", ())] == stored.get(image.mode)
    if not upright or not usual or image.info.get("adobe_transform", 1) != 1:
        return None
    return Jpeg(data, (image.height, image.width, 3))


def decode_jpegs(data: Sequence[Tensor], shapes: Sequence[tuple[int, int]], device: torch.device) -> list[Tensor]:
    """uint8 [3, h, w] on the device of each of the files (uint8 [bytes], on the CPU).

    On a GPU this is one call of nvJPEG, which uses the hardware decoder if there is one and waits for the current stream.

    Raises:
        Undecodable: the device cannot decode one of them, or its shape differs.
    """
    from torchcodec.decoders import decode_jpeg  # pyright: ignore[reportPrivateImportUsage]

    try:
        images = decode_jpeg(list(data), mode="RGB", device=device)
        assert isinstance(images, list)
    except RuntimeError as error:
        raise Undecodable(errors.first_line(error)) from error
    if [tuple(image.shape[1:]) for image in images] != list(shapes):
        raise Undecodable("other shapes than the headers say")
    return images
