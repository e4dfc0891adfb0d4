"""The one feature loop: everything that needs features of many images comes here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dino import distributed
from dino.data.decode import BadImage
from dino.data.evaluation_views import RESIZES, Resize
from dino.data.loader import start_worker
from dino.data.normalize import normalize
from dino.data.sources import Source
from dino.machine import count_spare_cores
from dino.models import Backbone
from dino.options import required


class EvaluationViews(Dataset[tuple[list[Tensor], list[int], list[tuple[str, str]]]]):
    """Batches of views with the positions they come from; unreadable images are left out and named.

    A batch is in parts: images in a row whose views have one shape. `threads` read its images side by side.
    """

    def __init__(
        self, source: Source, indices: Sequence[int], size: int, batch_size: int, view: Resize, threads: int = 1
    ):
        self.source, self.indices, self.size, self.batch_size = source, indices, size, batch_size
        self.view, self.threads = RESIZES[view], threads

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __getitem__(self, item: int) -> tuple[list[Tensor], list[int], list[tuple[str, str]]]:
        chosen = self.indices[item * self.batch_size : (item + 1) * self.batch_size]
        with ThreadPoolExecutor(self.threads) as pool:
            read = list(pool.map(self._read, map(int, chosen)))
        images = [view for _, view in read if isinstance(view, np.ndarray)]
        kept = [index for index, view in read if isinstance(view, np.ndarray)]
        bad = [(self.source.name(index), view.reason) for index, view in read if isinstance(view, BadImage)]
        parts = [torch.from_numpy(np.stack(list(part)))[None] for _, part in groupby(images, lambda i: i.shape)]
        return parts, kept, bad

    def _read(self, index: int) -> tuple[int, np.ndarray | BadImage]:
        try:
            return index, self.view(self.source.read(index), self.size)
        except BadImage as error:
            return index, error


Pooling = Literal[
    "cls", "average", "gem", "cls+average", "cls+gem", "last4", "last4+average", "any size", "three scales", "patches"
]


def gem(patches: Tensor, power: float = 4.0) -> Tensor:
    """Generalized mean over patches [n, p, d] -> [n, d], as the reference's copy detection takes it."""
    return patches.clamp(min=1e-6).pow(power).mean(dim=1).pow(1 / power)


def _cls_and(pool: Callable[[Tensor], Tensor]) -> Callable[[Backbone, Tensor], Tensor]:
    def read(model: Backbone, images: Tensor) -> Tensor:
        tokens = model.tokens(images)[-1]
        return torch.cat([tokens[:, 0], pool(tokens[:, 1:])], dim=1)

    return read


def _last4_and_average(model: Backbone, images: Tensor) -> Tensor:
    blocks = model.tokens(images, layers=4)
    return torch.cat([*(tokens[:, 0] for tokens in blocks), blocks[-1][:, 1:].mean(dim=1)], dim=1)


def _whole_patches(model: Backbone, images: Tensor) -> Tensor:
    """Images cut on the right and below where the model needs whole patches, as the reference's convolution does."""
    (height, width), patch = images.shape[-2:], model.patch_size
    if min(height, width) < patch:  # a narrow image at a small scale
        height, width = max(height, patch), max(width, patch)
        images = F.interpolate(images, (height, width), mode="bilinear")
    try:
        model.grid(height, width)
    except ValueError:
        return images[..., : height // patch * patch, : width // patch * patch]
    return images


def _mean_over(scales: tuple[float, ...]) -> Callable[[Backbone, Tensor], Tensor]:
    def read(model: Backbone, images: Tensor) -> Tensor:
        features = []
        for scale in scales:
            scaled = images if scale == 1 else F.interpolate(images, scale_factor=scale, mode="bilinear")
            features.append(model(_whole_patches(model, scaled)))
        return torch.stack(features).mean(dim=0)

    return read


# Normalized images to features [n, d]: the last [CLS], patches of the last block pooled, both, the last four [CLS], or
# the last [CLS] of images of any size, as they are or as the mean over three scales (the reference's retrieval); or the
# patches of the last block themselves, [n, p, d].
POOLINGS: dict[Pooling, Callable[[Backbone, Tensor], Tensor]] = {
    "cls": lambda model, images: model(images),
    "average": lambda model, images: model.tokens(images)[-1][:, 1:].mean(dim=1),
    "gem": lambda model, images: gem(model.tokens(images)[-1][:, 1:]),
    "cls+average": _cls_and(lambda patches: patches.mean(dim=1)),
    "cls+gem": _cls_and(gem),
    "last4": lambda model, images: torch.cat([tokens[:, 0] for tokens in model.tokens(images, layers=4)], dim=1),
    "last4+average": _last4_and_average,
    "any size": _mean_over((1,)),
    "three scales": _mean_over((1, 2**-0.5, 0.5)),
    "patches": lambda model, images: model.tokens(images)[-1][:, 1:],
}


class Features(NamedTuple):
    values: Tensor  # [m, d] float32, on the CPU
    indices: np.ndarray  # [m] positions in the source; fewer than asked for when images were unreadable
    bad: list[tuple[str, str]]


def choose_batch_size(size: int) -> int:
    """Images of `size` pixels to compute at a time: 128, fewer of more than 224 pixels."""
    return max(1, min(128, 128 * 224**2 // size**2))


@torch.no_grad()
def extract_batches(
    model: Backbone,
    source: Source,
    size: int,
    device: torch.device | str,
    indices: Sequence[int],
    batch_size: int,
    num_workers: int | None = None,
    progress: str | None = None,
    pooling: Pooling = "cls",
    view: Resize = "center",
    fp16: bool = False,
) -> Iterator[Features]:
    """What `extract` gives, batch after batch, each of `batch_size` of the `indices`, the last of the rest.

    Args:
        fp16: compute in half precision where a GPU does.
    """
    device = torch.device(device)
    if num_workers is None:  # starting processes costs more than a few hundred small images
        num_workers = count_spare_cores() if len(indices) * size**2 > 2e7 and device.type == "cuda" else 0
    threads = 1 if num_workers else torch.get_num_threads()
    views = EvaluationViews(source, indices, size, batch_size, view, threads)
    on_gpu = device.type == "cuda"
    start = start_worker if num_workers else None
    loader = DataLoader(views, batch_size=None, num_workers=num_workers, worker_init_fn=start, pin_memory=on_gpu)
    read, half = POOLINGS[pooling], fp16 and on_gpu
    show = progress is not None and sys.stderr.isatty()
    batches = track(loader, description=progress, total=len(views), transient=True) if show and progress else loader
    late: list[Features] = []  # on the device
    for parts, positions, bad in batches:
        with torch.autocast(device.type, torch.float16, enabled=half):
            views_of = (normalize(part.to(device, non_blocking=True), model.in_channels) for part in parts)
            values = [read(model, images).float() for images in views_of]
        found = torch.cat(values) if values else torch.zeros(0, model.embed_dim)
        late.append(Features(found, np.array(positions, dtype=np.int64), bad))
        if len(late) > on_gpu:  # a GPU is asked for the features of one batch when it has the next
            yield late[0]._replace(values=late.pop(0).values.cpu())
    yield from (part._replace(values=part.values.cpu()) for part in late)


def extract(
    model: Backbone,
    source: Source,
    size: int,
    device: torch.device | str = "cpu",
    indices: Sequence[int] | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    progress: str | None = None,
    pooling: Pooling = "cls",
    shared: bool = False,
    view: Resize = "center",
) -> Features:
    """Features of the images of `source` (those at `indices`), in order, in float32 as the reference does.

    Args:
        size: edge of the evaluation view, pixels.
        batch_size: images at a time. None: 128, fewer of more than 224 pixels.
        progress: a label shows a progress bar on the terminal.
        pooling: what of the model's outputs is the feature.
        shared: every rank computes its share and gets all of them; all ranks must call this.
        view: how an image is brought to that size, see `VIEWS`.
    """
    batch_size = batch_size or choose_batch_size(size)
    indices = range(len(source)) if indices is None else indices
    if shared and distributed.world_size() > 1:
        # Whole batches, so that each is computed as it would be on one rank.
        starts = range(distributed.rank() * batch_size, len(indices), distributed.world_size() * batch_size)
        mine = [index for start in starts for index in indices[start : start + batch_size]]
        part = extract(model, source, size, device, mine, batch_size, num_workers, progress, pooling, view=view)
        return _together(distributed.gather(part), indices)
    found = [*extract_batches(model, source, size, device, indices, batch_size, num_workers, progress, pooling, view)]
    return Features(
        torch.cat([part.values for part in found if len(part.values)] or [torch.zeros(0, model.embed_dim)]),
        np.concatenate([np.zeros(0, np.int64), *(part.indices for part in found)]),
        [entry for part in found for entry in part.bad],
    )


def _together(parts: list[Features], indices: Sequence[int]) -> Features:
    """The ranks' features in the order of `indices`."""
    place = {index: i for i, index in enumerate(map(int, indices))}
    kept = np.concatenate([part.indices for part in parts])
    order = np.argsort([place[index] for index in kept.tolist()], kind="stable")
    values = torch.cat([part.values for part in parts if len(part.values)] or [parts[0].values])
    return Features(values[torch.from_numpy(order)], kept[order], [entry for part in parts for entry in part.bad])


def readable_labels(source: Source, found: Features, what: str) -> Tensor:
    """[m] int64, of the images that could be read; the others are counted and one is named.

    Raises:
        ValueError: none could be read.
    """
    report_unreadable(found.bad, what)
    if not len(found.indices):
        raise ValueError(f"none of the {len(source)} {what} images can be read; check the data folder.")
    return torch.from_numpy(required(source.labels)[found.indices])


def report_unreadable(bad: list[tuple[str, str]], what: str) -> None:
    if bad and distributed.is_main():
        print(f"{len(bad)} {what} images could not be read, first: {bad[0][0]} ({bad[0][1]})")
