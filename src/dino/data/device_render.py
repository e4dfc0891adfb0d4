"""Views rendered on a device: all views of a size at a time, in a few kernels, without waiting for the device.

A worker process decodes and hands over whole images; photographs of the usual size have no more bytes than their views. The
training process sends them to the device, which does the rest. Cutting and resizing are two matrix products, columns first;
the matrices hold Pillow's weights (bicubic, antialiased) and are zero outside of a view's box. A worker cuts the views of
larger images itself. If the device decodes (`dino.data.device_decode`), the worker hands over the bytes of files.

Axes: n images, v views of a size, s pixels of their edge; m = v * n, view by view. Color is RGB, 0 to 255.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino.data.device_decode import Jpeg, decode_jpegs, read_jpeg
from dino.data.render import HUE_STEPS, CpuRenderer, Renderer, blur_kernels, crop
from dino.data.sources import Source
from dino.data.views import CONTRAST, HUE, SATURATION, Views
from dino.distributed import send
from dino.models.preprocessing import LUMA

LARGEST = 640  # edge in pixels; the worker cuts the views of larger images
ALIGNMENT = 8  # row lengths are multiples of this, as fast products in half precision need
MOST_NUMBERS = 2**27  # between the two products, for images of one part
REACH = 2  # of the bicubic filter, pixels of the resized picture


def _extent(shapes: Sequence[tuple[int, ...]]) -> tuple[int, int]:
    """Height and width of pages that hold images of these shapes."""
    height, width = (max([shape[axis] for shape in shapes], default=0) for axis in (0, 1))
    return height, -(-width // ALIGNMENT) * ALIGNMENT


class DeviceRenderer:
    """Workers pack images, `device` does the rest. On a GPU, products are in half precision (errors of 0.1 levels).

    Args:
        decode: let the device decode the JPEG files that it can.
    """

    def __init__(self, device: torch.device | str, decode: bool = False):
        self.device, self.decode = torch.device(device), decode
        self.dtype = torch.float16 if self.device.type == "cuda" else torch.float32

    def read(self, source: Source, index: int) -> np.ndarray | Jpeg:
        return read_jpeg(source, index, LARGEST) if self.decode else source.read(index)

    def prepare(self, images: Sequence[np.ndarray | Jpeg], views: Views) -> list[Tensor]:
        """Images of at most LARGEST pixels in one tensor; of larger ones the crops.

        Returns:
            uint8 [k, H, W, 3], each image in the upper left corner; the bytes of e files, one after the other; int64 [e, 3],
            their lengths, heights and widths; int64 [k + e], the positions of these images in the batch; then the crops of
            all other images, as `crop` returns them.
        """
        files = [(i, image) for i, image in enumerate(images) if isinstance(image, Jpeg)]
        pixels = [(i, image) for i, image in enumerate(images) if not isinstance(image, Jpeg)]
        small = [(i, image) for i, image in pixels if max(image.shape) <= LARGEST]
        large = [(i, image) for i, image in pixels if max(image.shape) > LARGEST]
        canvas = torch.empty((len(small), *_extent([image.shape for _, image in small]), 3), dtype=torch.uint8)
        for page, (_, image) in zip(canvas.numpy(), small, strict=True):
            page[: len(image), : image.shape[1]] = image
        data = b"".join(jpeg.data for _, jpeg in files) or bytes(1)
        sizes = torch.tensor([(len(jpeg.data), *jpeg.shape[:2]) for _, jpeg in files], dtype=torch.int64).view(-1, 3)
        which = torch.tensor([i for i, _ in small + files], dtype=torch.int64)
        crops = crop([image for _, image in large], views.of([i for i, _ in large]))
        return [canvas, torch.frombuffer(bytearray(data), dtype=torch.uint8), sizes, which, *crops]

    def finish(self, prepared: list[Tensor], views: Views) -> list[Tensor]:
        """Views by group of equal size: uint8 [v, n, s, s, 3] on the device.

        Raises:
            Undecodable: the device cannot decode a file.
        """
        which, num_images = np.array(prepared[3].tolist(), np.int64), len(views.box)
        pages = self._pages(*prepared[:3])
        placed, *cut = (send(x, self.device) for x in prepared[3:])
        others = _send(np.setdiff1d(np.arange(num_images), which), self.device)
        kernels, groups = blur_kernels(views.sigma), []
        for crops, group in zip(cut, views.groups, strict=True):
            box, flip = (_send(drawn[which, group], self.device) for drawn in (views.box, views.flip))
            widest = max(1.0, views.box[which, group, 2:].max(initial=1) / crops.shape[2])
            x = crop_batch(pages, box, flip, crops.shape[2], widest)
            if not np.array_equal(which, np.arange(num_images)):
                whole = x.new_empty(len(x), num_images, *x.shape[2:])
                whole[:, placed], whole[:, others] = x, crops.permute(0, 1, 4, 2, 3).to(x.dtype)
                x = whole
            groups.append(self.color(x, Parameters(views, kernels, group, self.device)))
        return groups

    def _pages(self, canvas: Tensor, data: Tensor, sizes: Tensor) -> Tensor:
        """[k + e, 3, H, W] in the precision of the products."""
        pages = send(canvas, self.device).permute(0, 3, 1, 2)
        if not len(sizes):
            return pages.to(self.dtype, memory_format=torch.contiguous_format)
        lengths, *edges = zip(*sizes.tolist(), strict=True)
        decoded = decode_jpegs(data.split(lengths), list(zip(*edges, strict=True)), self.device)
        images = [*pages, *decoded]
        height, width = _extent([image.shape[1:] for image in images])
        whole = torch.zeros((len(images), 3, height, width), dtype=self.dtype, device=self.device)
        for page, image in zip(whole, images, strict=True):
            page[:, : image.shape[1], : image.shape[2]] = image
        return whole

    def color(self, crops: Tensor, parameters: Parameters) -> Tensor:
        """Crops [v, n, 3, s, s] of whole numbers, colored: uint8 [v, n, s, s, 3]."""
        colored = _color_batch(crops.flatten(0, 1), parameters).to(torch.uint8)
        return colored.permute(0, 2, 3, 1).contiguous().unflatten(0, crops.shape[:2])


def choose_renderer(device: torch.device, decode: bool) -> Renderer:
    """A GPU renders itself, and decodes if asked to; a CPU leaves everything to the workers."""
    return DeviceRenderer(device, decode) if device.type == "cuda" else CpuRenderer()


def _send(values: np.ndarray, device: torch.device) -> Tensor:
    return send(torch.from_numpy(np.ascontiguousarray(values)), device)


def crop_batch(pages: Tensor, box: Tensor, flip: Tensor, size: int, widest: float) -> Tensor:
    """Boxes of the pages, resized to `size` and flipped: float32 whole numbers [v, k, 3, s, s].

    Args:
        pages: [k, 3, H, W] of whole numbers, in the precision of the products.
        box: [k, v, 4] top, left, height, width, pixels; flip: bool [k, v], both on the device of the pages.
        widest: pixels of a page that become one, at most.
    """
    (_, channels, height, width), (num_pages, num_views) = pages.shape, flip.shape
    if not num_pages:
        return pages.new_zeros(num_views, 0, channels, size, size).float()
    parts = []
    some = max(1, MOST_NUMBERS // max(1, channels * height * num_views * size))
    for page, b, f in zip(pages.split(some), box.split(some), flip.split(some), strict=True):
        columns = _weights(b[..., 1], b[..., 3], size, width, widest, f).to(page.dtype)
        narrow = (page.flatten(1, 2) @ columns.flatten(1, 2).mT).unflatten(1, (channels, height))
        # Rounded between the two products, as in Pillow.
        narrow = narrow.round_().clamp_(0, 255).unflatten(3, (num_views, size))
        rows = _weights(b[..., 0], b[..., 2], size, height, widest, torch.zeros_like(f)).to(page.dtype)
        parts.append(torch.einsum("kvrh,kchvs->vkcrs", rows, narrow).float().round_().clamp_(0, 255))
    return torch.cat(parts, dim=1)


def _weights(start: Tensor, length: Tensor, size: int, extent: int, widest: float, flip: Tensor) -> Tensor:
    """Each line of `extent` pixels, cut to `length` from `start` and resized, as a matrix: float32 [..., size, extent]."""
    scale = (length / size)[..., None]
    reach = REACH * scale.clamp(min=1)
    out = torch.arange(size, device=start.device)
    center = (torch.where(flip[..., None], size - 1 - out, out) + 0.5) * scale  # in the box, [..., size]
    first = (center - reach + 0.5).floor().clamp(min=0)
    last = torch.minimum((center + reach + 0.5).floor(), length[..., None])
    taps = torch.arange(int(2 * REACH * widest) + 2, device=start.device)
    pixel = first[..., None] + taps  # [..., size, taps]
    distance = (pixel + 0.5 - center[..., None]) * (REACH / reach[..., None])
    weight = compute_cubic(distance, -0.5) * (pixel < last[..., None])
    weight /= weight.sum(-1, keepdim=True)
    place = (start[..., None, None] + pixel).clamp(max=extent - 1).long()  # taps beyond the extent have weight 0
    return weight.new_zeros(*weight.shape[:-1], extent).scatter_add_(-1, place, weight)


def compute_cubic(x: Tensor, a: float) -> Tensor:
    """Keys' convolution kernel, 0 from 2 on. Pillow's `a` is -1/2."""
    x = x.abs()
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


class Parameters:
    """Color parameters of the views of one group, as tensors on the device; m in front."""

    def __init__(self, views: Views, kernels: np.ndarray, group: slice, device: torch.device):
        def rows(values: np.ndarray) -> np.ndarray:
            return values[:, group].swapaxes(0, 1).reshape(-1, *values.shape[2:])

        send = functools.partial(_send, device=device)
        jitter, order, factors = rows(views.jitter), rows(views.order), rows(views.factors)
        steps = (factors[:, HUE] * HUE_STEPS).astype(np.int64)
        taken = np.take_along_axis(factors, order.astype(np.int64), 1)
        taken[~jitter] = 1
        taken[order == HUE] = 1
        self.factors = send(taken.T[..., None, None, None])  # [4, m, 1, 1, 1], by position in the order
        self.contrast = send((order == CONTRAST).astype(np.float32).T[..., None, None, None])
        self.saturation = send((order == SATURATION).astype(np.float32).T[..., None, None, None])
        # These positions are computed here, so that the process need not wait for the device.
        shifted = [np.flatnonzero(jitter & (order[:, k] == HUE) & (steps != 0)) for k in range(4)]
        self.shifted = [send(which) for which in shifted]
        self.steps = [send(steps[which].astype(np.float32)[:, None, None, None]) for which in shifted]
        self.gray = send(rows(views.gray)[:, None, None, None])
        blurred = np.flatnonzero(rows(views.sigma) > 0)
        self.blurred = send(blurred)
        self.kernels = send(rows(kernels)[blurred])
        self.solarize = send(rows(views.solarize)[:, None, None, None])
        self.luma = send(np.array(LUMA, np.float32)[:, None, None])


def _color_batch(x: Tensor, p: Parameters) -> Tensor:
    """x, float [m, 3, s, s] of whole numbers, colored; may change it in place."""
    for k in range(4):
        luma = _round((x * p.luma).sum(1, keepdim=True))
        anchor = p.contrast[k] * _round(luma.mean((2, 3), keepdim=True)) + p.saturation[k] * luma
        # x holds whole numbers, so a factor of 1 changes nothing.
        x = ((x - anchor) * p.factors[k] + anchor).clamp_(0, 255).floor_()
        if len(p.shifted[k]):
            x[p.shifted[k]] = _shift_hue_batch(x[p.shifted[k]], p.steps[k])
    x = torch.where(p.gray, _round((x * p.luma).sum(1, keepdim=True)), x)
    if len(p.blurred):
        x[p.blurred] = _round(_blur_batch(x[p.blurred], p.kernels))
    return torch.where(p.solarize & (x >= 128), 255 - x, x)


def _round(x: Tensor) -> Tensor:
    return (x + 0.5).floor_()


def _shift_hue_batch(x: Tensor, steps: Tensor) -> Tensor:
    """Converts to 8-bit hue, saturation and value and back, as Pillow."""
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = high - low
    red, green, blue = ((high - x) / chroma.clamp(min=1)).split(1, 1)
    hue = torch.where(x[:, :1] == high, blue - green, torch.where(x[:, 1:2] == high, 2 + red - blue, 4 + green - red))
    hue = ((hue / 6 + 1) % 1 * 255).floor_()
    saturation = (chroma / high.clamp(min=1) * 255).floor_()
    sextant = (hue + steps) % 256 * (6 / 255)
    k = (sextant + torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)) % 6
    return _round(high * (1 - saturation / 255 * torch.minimum(k, 4 - k).clamp_(0, 1)))


def _blur_batch(x: Tensor, kernels: Tensor) -> Tensor:
    """Each of the m images with its own kernel [m, taps], rows first."""
    m, channels, height, width = x.shape
    half = kernels.shape[1] // 2
    kernels = kernels.repeat_interleave(channels, 0)[:, None]
    x = x.reshape(1, m * channels, height, width)
    x = F.conv2d(F.pad(x, (half, half, 0, 0), mode="replicate"), kernels[:, :, None, :], groups=m * channels)
    x = F.conv2d(F.pad(x, (0, 0, half, half), mode="replicate"), kernels[..., None], groups=m * channels)
    return x.view(m, channels, height, width)
