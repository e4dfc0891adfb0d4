"""Views of images, as pixels: the parameters drawn by `dino.data.views` applied to decoded images.

A `Renderer` does it: `CpuRenderer` in a worker process, view by view, with OpenCV and PyTorch's resize;
`dino.data.device_render.DeviceRenderer` on a GPU, all views of a size at once. Tests compare both with Pillow and
torchvision.

Axes: n images, v views, s pixels; m = v * n, view by view. Color is RGB, 0 to 255.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino.data.sources import Source
from dino.data.views import CONTRAST, HUE, SATURATION, Views
from dino.models.preprocessing import LUMA

HUE_STEPS = 255  # hues of Pillow's color circle, as torchvision counts them

# Pillow truncates after each change of brightness, contrast or saturation, and OpenCV rounds: subtracting half a level
# makes them equal. It is a little less than half, so that whole numbers do not change.
_CUT = -0.499


def crop(images: Sequence[np.ndarray], views: Views) -> list[Tensor]:
    """Boxes of the images ([h, w, 3] uint8 each), resized (bicubic, antialiased, as Pillow) and flipped.

    By group of views of equal size: uint8 [v, n, s, s, 3].
    """
    groups = [_empty(len(images), views.sizes[group]) for group in views.groups]
    # Image by image: its pixels stay in the processor's cache for all of its views.
    for i, (image, boxes, flips) in enumerate(zip(images, views.box.tolist(), views.flip.tolist(), strict=True)):
        for out, box, flip in zip(_per_view(groups), boxes, flips, strict=True):
            _crop(image, box, flip, out[i])
    return groups


class Renderer(Protocol):
    """How files become views, chosen once per run: by the workers alone, or by the workers and then the device.

    A worker reads and prepares, and the training process finishes. What passes between them is the renderer's own affair.
    """

    def read(self, source: Source, index: int) -> Any:
        """One image, with its `shape`; raises `dino.data.decode.BadImage`."""
        ...

    def prepare(self, images: Sequence[Any], views: Views) -> list[Tensor]:
        """The worker's share of making `views` of images that `read` returned."""
        ...

    def finish(self, prepared: list[Tensor], views: Views) -> list[Tensor]:
        """The device's share; views by group of equal size: uint8 [v, n, s, s, 3]."""
        ...


class CpuRenderer:
    """A worker does everything, with OpenCV and PyTorch's resize, one view after the other on one thread."""

    def read(self, source: Source, index: int) -> np.ndarray:
        return source.read(index)

    def prepare(self, images: Sequence[np.ndarray], views: Views) -> list[Tensor]:
        """Views of `images` ([h, w, 3] uint8 each) by group of equal size: uint8 [v, n, s, s, 3]."""
        # All crops first: switching between PyTorch and OpenCV for each view is a sixth slower.
        return self.color(crop(images, views), views)

    def finish(self, prepared: list[Tensor], views: Views) -> list[Tensor]:
        return prepared

    def color(self, crops: list[Tensor], views: Views) -> list[Tensor]:
        """Changes what `crop` returned, in place."""
        drawn = (views.jitter, views.order, views.factors, views.gray, views.solarize)
        samples = zip(*(values.tolist() for values in drawn), _short(blur_kernels(views.sigma)), strict=True)
        for i, sample in enumerate(samples):
            for out, *parameters in zip(_per_view(crops), *sample, strict=True):
                _color(out[i], *parameters)
        return crops


def blur_kernels(sigma: np.ndarray) -> np.ndarray:
    """The row (and column) of Pillow's Gaussian blur for each standard deviation: float32 [..., taps], sum 1.

    Three box filters of the same fractional length, as one filter (Gwosdek et al., "Theoretical foundations of Gaussian
    convolution by extended box filtering", 2011). Where sigma is 0, the kernel is 1 in the middle and 0 elsewhere.
    """
    variance = np.asarray(sigma, np.float64)[..., None] ** 2 / 3
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    rest = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    reach = int(whole.max(initial=0)) + 1
    offsets = np.abs(np.arange(-reach, reach + 1))
    box = np.clip(whole + rest + 1 - offsets, 0, 1) / (2 * (whole + rest) + 1)
    kernel = _convolve(_convolve(box, box), box)
    return ((kernel + kernel[..., ::-1]) / 2).astype(np.float32)  # exactly symmetric, which OpenCV filters faster


def _convolve(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Along the last axis, full."""
    out = np.zeros((*a.shape[:-1], a.shape[-1] + b.shape[-1] - 1))
    for k in range(b.shape[-1]):
        out[..., k : k + a.shape[-1]] += a * b[..., k, None]
    return out


def _empty(num_images: int, sizes: tuple[int, ...]) -> Tensor:
    return torch.empty((len(sizes), num_images, sizes[0], sizes[0], 3), dtype=torch.uint8)


def _per_view(groups: list[Tensor]) -> list[np.ndarray]:
    """The pixels [n, s, s, 3] of each of the v views."""
    return [view for group in groups for view in group.numpy()]


def _crop(image: np.ndarray, box: list[int], flip: bool, out: np.ndarray) -> None:
    top, left, height, width = box
    # A copy, with the batch dimension added before the permutation, counts as channels last: PyTorch is twice as fast.
    part = torch.from_numpy(image[top : top + height, left : left + width].copy())
    planes = part.unsqueeze(0).permute(0, 3, 1, 2)
    resized = F.interpolate(planes, size=out.shape[:2], mode="bicubic", antialias=True)
    pixels = resized[0].permute(1, 2, 0).numpy()
    if flip:
        cv2.flip(pixels, 1, dst=out)
    else:
        np.copyto(out, pixels)


def _color(
    x: np.ndarray, jitter: bool, order: list[int], factors: list[float], gray: bool, solarize: bool, kernel: np.ndarray
) -> None:
    """Colors x [s, s, 3] in place."""
    if jitter:
        _jitter(x, order, factors)
    if gray:
        luma = cv2.cvtColor(x, cv2.COLOR_RGB2GRAY)
        _blur(luma, kernel)
        cv2.cvtColor(luma, cv2.COLOR_GRAY2RGB, dst=x)
    else:
        _blur(x, kernel)
    if solarize:
        cv2.min(x, cv2.bitwise_not(x), dst=x)  # inverts values of 128 and above


def _jitter(x: np.ndarray, order: list[int], factors: list[float]) -> None:
    """Brightness, contrast, saturation and hue in place, in this order.

    All but hue are y = a * x + b * luma(x) + c. A factor up to 1 needs no clipping, so such a step is merged into the next:
    a, b and c hold the merged steps that have not been applied to x yet.
    """
    a, b, c = 1.0, 0.0, 0.0
    for step in order:
        factor = factors[step]
        if step == HUE:
            _affine(x, a, b, c)
            a, b, c = 1.0, 0.0, 0.0
            _shift_hue(x, int(factor * HUE_STEPS))
            continue
        if factor == 1:
            continue
        rest = 1 - factor
        if step == CONTRAST:
            mean = (a + b) * sum(w * m for w, m in zip(LUMA, cv2.mean(x), strict=False)) + c
            a, b, c = factor * a, factor * b, factor * c + rest * int(mean + 0.5) + _CUT
        elif step == SATURATION:
            a, b, c = factor * a, factor * b + rest * (a + b), c + _CUT
        else:
            a, b, c = factor * a, factor * b, factor * c + _CUT
        if factor > 1:
            _affine(x, a, b, c)
            a, b, c = 1.0, 0.0, 0.0
    _affine(x, a, b, c)


def _affine(x: np.ndarray, a: float, b: float, c: float) -> None:
    """a * x + b * luma(x) + c in place."""
    if a == 1 and b == 0:  # then c is 0, too
        return
    red, green, blue = (b * w for w in LUMA)
    matrix = np.array([[a + red, green, blue, c], [red, a + green, blue, c], [red, green, a + blue, c]])
    cv2.transform(x, matrix, dst=x)


def _shift_hue(x: np.ndarray, steps: int) -> None:
    if steps == 0:
        return
    hsv = cv2.cvtColor(x, cv2.COLOR_RGB2HSV_FULL)
    rows = hsv.reshape(len(hsv), -1)
    rows += _hue_of_row(x.shape[1]) * np.uint8(steps % 256)  # uint8 wraps around the circle
    cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL, dst=x)


@functools.cache
def _hue_of_row(width: int) -> np.ndarray:
    """1 where a row of HSV pixels holds the hue, else 0."""
    return np.tile(np.array([1, 0, 0], np.uint8), width)


def _short(kernels: np.ndarray) -> list[list[np.ndarray]]:
    """The kernels [n, v, taps] without the outer taps that together change a pixel by less than an eighth of a level."""
    half = kernels.shape[-1] // 2
    negligible = kernels[..., :half].cumsum(-1) < 2**-12
    inner = ~np.concatenate([negligible, np.zeros_like(kernels[..., :1], bool), negligible[..., ::-1]], -1)
    kernels = kernels * inner
    kernels /= kernels.sum(-1, keepdims=True)
    cuts = negligible.sum(-1).tolist()
    return [
        [kernel[cut : len(kernel) - cut] for kernel, cut in zip(*sample, strict=True)]
        for sample in zip(kernels, cuts, strict=True)
    ]


def _blur(x: np.ndarray, kernel: np.ndarray) -> None:
    if len(kernel) > 1:
        cv2.sepFilter2D(x, -1, kernel, kernel, dst=x, borderType=cv2.BORDER_REPLICATE)
