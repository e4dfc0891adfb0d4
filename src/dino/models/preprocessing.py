"""How pictures become the input of a network, as the weights want it: plain values, which travel with the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

Interpolation = Literal["bicubic", "bilinear", "lanczos", "nearest"]
Resize = Literal["center", "stretched"]

MEAN = (0.485, 0.456, 0.406)  # RGB of ImageNet, white = 1
STD = (0.229, 0.224, 0.225)
LUMA = (0.299, 0.587, 0.114)  # weights of the colors (ITU-R BT.601)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Resize, crop, normalize.

    Args:
        mean, std: of a channel, white = 1; one number each where the network takes the luma of the colors.
        interpolation: of the resize, with antialiasing.
        resize: "center" keeps the aspect ratio, "stretched" makes the whole image a square; then the central square is taken.
        crop: edge of that square over the shorter side it is cut from. None: 224 / 256 from 128 pixels on, below that 1, so
            that small images keep their border; 1 for what is stretched.
        size: edge of the square in an evaluation, pixels. None: the network's own `image_size`.
    """

    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    interpolation: Interpolation = "bicubic"
    resize: Resize = "center"
    crop: float | None = None
    size: int | None = None

    def choose_edge(self, size: int) -> int:
        """Shorter side to which an image is resized before its central square of `size` is taken, pixels."""
        if self.crop is None:
            return size * 256 // 224 if size >= 128 and self.resize == "center" else size
        return int(size / self.crop + 1e-6)  # as timm: 255.9999 is 256


IMAGENET = Preprocessing()
_LUMA_MEAN, _LUMA_STD = (sum(w * x for w, x in zip(LUMA, of, strict=True)) for of in (MEAN, STD))
GRAY = Preprocessing((_LUMA_MEAN,), (_LUMA_STD,))


def choose_preprocessing(arguments: Mapping[str, Any]) -> Preprocessing:
    """What arguments of `create` say; ImageNet's values for what is absent or None, of one channel their luma.

    Raises:
        ValueError: mean or std has another number of values than there are channels.
    """
    channels, names = arguments.get("in_channels", 3), ("mean", "std", "interpolation", "resize", "crop")
    given = {name: arguments.get(name) for name in names} | {"size": arguments.get("eval_size")}
    for name in ("mean", "std"):
        if (values := given[name]) is not None and len(values) != channels:
            raise ValueError(f"{name} has {len(values)} values for {channels} channel(s); give one for each channel.")
    usual = GRAY if channels == 1 else IMAGENET
    return dataclasses.replace(usual, **{name: value for name, value in given.items() if value is not None})


class Preprocessed:
    """What every backbone knows of the pictures that it takes."""

    image_size: int
    preprocessing: Preprocessing = IMAGENET
    number_layers: Callable[[], dict[str, int]]  # of each parameter
    transform: Callable[..., Any]  # a picture as input; of what `dino.load` returns
    embed: Callable[..., Tensor]  # pictures to features [n, d]

    @property
    def view_size(self) -> int:
        """Edge of an evaluation's view, pixels."""
        return self.preprocessing.size or self.image_size

    def maps(self: Any, images: Float[Tensor, "n c h w"], layers: int = 1) -> list[Float[Tensor, "n d rows columns"]]:
        """The cells of `tokens` as maps, for detectors and segmentation; oldest first."""
        grid = self.grid(*images.shape[-2:])
        return [tokens[:, 1:].transpose(1, 2).unflatten(2, grid) for tokens in self.tokens(images, layers)]
