"""`model.transform` and `model.embed`, which `dino.load` gives its models: pictures to tensors and features."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dino.data.decode import BadImage, decode, to_rgb
from dino.data.evaluation_views import make_square
from dino.data.normalize import normalize
from dino.models import Backbone
from dino.models.preprocessing import Preprocessing

Picture = str | os.PathLike[str] | Image.Image | np.ndarray  # a file, or pixels (an array [h, w, 3] uint8)


class Transform:
    """A picture as the input of its model: float32 [channels, size, size].

    ``model.transform("a.jpg")`` is the view of an evaluation; ``model.transform(train=True)`` is a function that crops at
    random (8 to 100 % of the area), flips half of the pictures, and draws anew at each call, for fine-tuning.
    """

    def __init__(self, wanted: Preprocessing, size: int):
        self.wanted, self.size = wanted, size

    def __call__(self, picture: Picture | None = None, train: bool = False) -> Any:
        if picture is None:
            return functools.partial(self, train=True) if train else self
        pixels = read_picture(picture)
        square = self._draw(pixels) if train else make_square(pixels, self.size, self.wanted)
        return normalize(torch.from_numpy(square.copy())[None, None], self.wanted)[0].contiguous()

    def _draw(self, pixels: np.ndarray) -> np.ndarray:
        from torchvision.transforms import InterpolationMode, RandomResizedCrop

        how = InterpolationMode(self.wanted.interpolation)
        view = np.asarray(RandomResizedCrop(self.size, (0.08, 1.0), interpolation=how)(Image.fromarray(pixels)))
        return view[:, ::-1] if torch.rand(()) < 0.5 else view


def read_picture(picture: Picture) -> np.ndarray:
    """Pixels [h, w, 3] uint8.

    Raises:
        BadImage: a file cannot be read.
        ValueError: it is no picture.
    """
    if isinstance(picture, Image.Image):
        return to_rgb(ImageOps.exif_transpose(picture) or picture)
    if isinstance(picture, str | os.PathLike):
        try:
            return decode(Path(picture))
        except BadImage as error:
            raise BadImage(f"{picture}: {error.reason}") from error
    if not isinstance(picture, np.ndarray):
        raise ValueError(f"{type(picture).__name__} {picture!s:.60} is no picture; give one path, PIL image or array.")
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(
            f"an array of {picture.dtype} {list(picture.shape)} is no picture; give uint8 [height, width, 3]."
        )
    return picture


def list_pictures(pictures: Any) -> list[Any]:
    """One picture is a list of one.

    Raises:
        ValueError: these are no pictures.
    """
    is_one = isinstance(pictures, np.ndarray) and pictures.ndim == 3
    if is_one or isinstance(pictures, str | os.PathLike | Image.Image):
        return [pictures]
    if not isinstance(pictures, Iterable):
        raise ValueError(f"{type(pictures).__name__} {pictures} is no picture; give paths, PIL images or arrays.")
    return list(pictures)


@torch.no_grad()
def embed(model: Backbone, transform: Transform, pictures: Picture | Iterable[Picture], batch_size: int = 64) -> Tensor:
    """Features of pictures, in order: float32 [n, d], on the CPU. The model computes in evaluation mode, on its device.

    Raises:
        BadImage: a file cannot be read; names it.
    """
    assert isinstance(model, torch.nn.Module)
    listed = list_pictures(pictures)
    like, was_training = next(model.parameters()), model.training
    model.eval()
    try:
        parts = [
            model(torch.stack([*map(transform, listed[i : i + batch_size])]).to(like))
            for i in range(0, len(listed), batch_size)
        ]
    finally:
        model.train(was_training)
    return torch.cat([part.float().cpu() for part in parts]) if parts else torch.zeros(0, model.embed_dim)


def attach(model: Any) -> None:
    """Give a model its `transform` and `embed`, and a sentence about them where it is called with a picture."""
    model.transform = Transform(model.preprocessing, model.view_size)
    embed_pictures: Callable[..., Tensor] = functools.partial(embed, model, model.transform)
    vars(model)["embed"] = embed_pictures
    model.register_forward_pre_hook(refuse_pictures)


def refuse_pictures(model: Any, inputs: tuple[Any, ...]) -> None:
    """Before a model computes.

    Raises:
        ValueError: it was given a picture, or one image where it takes a batch.
    """
    images = inputs[0] if inputs else None
    if isinstance(images, str | os.PathLike | Image.Image | np.ndarray | list):
        raise ValueError("a model takes tensors [n, c, h, w]; model.embed takes paths, PIL images and arrays.")
    if isinstance(images, Tensor) and images.ndim == 3:
        raise ValueError(f"a model takes a batch [n, c, h, w], not {list(images.shape)}; write images[None] for one.")
