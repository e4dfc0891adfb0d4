"""The one feature loop: everything that needs features of many images comes here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, zip_longest
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from dino import distributed, errors
from dino.data.decode import BadImage
from dino.data.evaluation_views import RESIZES, Resize
from dino.data.loader import Bad, announce, iterate
from dino.data.normalize import normalize
from dino.data.sources import Source
from dino.machine import count_spare_cores
from dino.models import Backbone
from dino.models.preprocessing import IMAGENET, Preprocessing
from dino.options import required
from dino.options.commands import EmbedOptions
from dino.options.rules import checked
from dino.terminal import track


class EvaluationViews(Dataset[tuple[list[Tensor], list[int], Bad]]):
    """Batches of evaluation views with the positions of their images. Unreadable images are left out and named.

    Item b is batch b as runs of views of one shape: uint8 [1, n, h, w, 3] each. `threads` read its images in parallel.
    """

    def __init__(
        self,
        source: Source,
        indices: Sequence[int] | np.ndarray,
        size: int,
        batch_size: int,
        resize: Resize = "as trained",
        threads: int = 1,
        wanted: Preprocessing = IMAGENET,
    ):
        self.source, self.indices, self.size, self.batch_size = source, indices, size, batch_size
        self.resize, self.threads, self.wanted = RESIZES[resize], threads, wanted

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __getitem__(self, item: int) -> tuple[list[Tensor], list[int], Bad]:
        announce(self.source, self._choose, item)
        chosen = self._choose(item)
        with ThreadPoolExecutor(self.threads) as pool:
            read = list(zip(chosen, pool.map(self._read, chosen), strict=True))
        views = [(index, view) for index, view in read if isinstance(view, np.ndarray)]
        bad = [(self.source.name(index), view.reason) for index, view in read if isinstance(view, BadImage)]
        runs = groupby((view for _, view in views), lambda view: view.shape)
        return [torch.from_numpy(np.stack(list(run)))[None] for _, run in runs], [index for index, _ in views], bad

    def _choose(self, item: int) -> list[int]:
        return [int(index) for index in self.indices[item * self.batch_size : (item + 1) * self.batch_size]]

    def _read(self, index: int) -> np.ndarray | BadImage:
        try:
            return self.resize(self.source.read(index), self.size, self.wanted)
        except BadImage as error:
            return error


Pooling = Literal[
    "cls", "average", "gem", "cls+average", "cls+gem", "last4", "last4+average", "any size", "three scales", "patches"
]
Pool = Callable[[Backbone, Tensor], Tensor]


def _pool_tokens(*parts: Callable[[list[Tensor]], Tensor], layers: int = 1) -> Pool:
    """Each of `parts` makes [n, d] of the tokens of the last `layers` blocks, [n, 1 + p, d] each."""

    def pool(model: Backbone, images: Tensor) -> Tensor:
        tokens = model.tokens(images, layers=layers)
        return torch.cat([part(tokens) for part in parts], dim=1)

    return pool


def _cls(tokens: list[Tensor]) -> Tensor:
    return torch.cat([block[:, 0] for block in tokens], dim=1)


def _average(tokens: list[Tensor]) -> Tensor:
    return tokens[-1][:, 1:].mean(dim=1)


def _gem(tokens: list[Tensor]) -> Tensor:
    """Generalized mean over patches, power 4, as the reference's copy detection takes it."""
    return tokens[-1][:, 1:].clamp(min=1e-6).pow(4.0).mean(dim=1).pow(0.25)


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


def _mean_over_scales(*scales: float) -> Pool:
    def pool(model: Backbone, images: Tensor) -> Tensor:
        if min(images.shape[-2:]) < 2:  # half of it would be nothing
            images = F.interpolate(images, [max(2, edge) for edge in images.shape[-2:]])
        scaled = (images if s == 1 else F.interpolate(images, scale_factor=s, mode="bilinear") for s in scales)
        return torch.stack([model(_whole_patches(model, image)) for image in scaled]).mean(dim=0)

    return pool


# Normalized images to features [n, d]: the last [CLS]; the patches of the last block pooled; both; the last four [CLS];
# the last [CLS] of images of any size, as they are or as the mean over three scales (the reference's retrieval); or the
# patches of the last block themselves, [n, p, d].
POOLINGS: dict[Pooling, Pool] = {
    "cls": lambda model, images: model(images),
    "average": _pool_tokens(_average),
    "gem": _pool_tokens(_gem),
    "cls+average": _pool_tokens(_cls, _average),
    "cls+gem": _pool_tokens(_cls, _gem),
    "last4": _pool_tokens(_cls, layers=4),
    "last4+average": _pool_tokens(_cls, _average, layers=4),
    "any size": _mean_over_scales(1),
    "three scales": _mean_over_scales(1, 2**-0.5, 0.5),
    "patches": lambda model, images: model.tokens(images)[-1][:, 1:],
}


class Features(NamedTuple):
    values: Tensor  # [m, d] float32, on the CPU
    indices: np.ndarray  # [m] positions in the source; fewer than asked for when images were unreadable
    bad: Bad

    @classmethod
    def concatenate(cls, parts: Sequence[Features], *shape: int) -> Features:
        """One after the other. `shape` is that of a feature, for the case of no image at all."""
        return cls(
            torch.cat([part.values for part in parts if len(part.values)] or [torch.zeros(0, *shape)]),
            np.concatenate([np.zeros(0, np.int64), *(part.indices for part in parts)]),
            [entry for part in parts for entry in part.bad],
        )


def require_finite(values: Tensor, model: object) -> Tensor:
    """`values` that `model` computed. On a GPU this waits for them.

    Raises:
        ValueError: some are NaN or infinite; names the model.
    """
    if not values.isfinite().all():
        name = getattr(model, "where", "") or getattr(model, "name", "") or "given"
        raise errors.NotFinite(
            f"the model {name} computes numbers that are not finite (NaN or infinity), so it is of no use; load an earlier "
            "checkpoint, or train again with a lower --optim.lr (with --fp16: try without)."
        )
    return values


def choose_batch_size(size: int) -> int:
    """Images of `size` pixels to compute at a time: 128, fewer of more than 224 pixels."""
    return max(1, min(128, 128 * 224**2 // size**2))


@torch.no_grad()
def extract_batches(
    model: Backbone,
    source: Source,
    size: int,
    indices: Sequence[int] | np.ndarray,
    batch_size: int,
    num_workers: int | None = None,
    progress: str | None = None,
    pooling: Pooling = "cls",
    resize: Resize = "as trained",
    fp16: bool = False,
) -> Iterator[Features]:
    """The features of `extract` in batches of `batch_size` indices; the last batch may be smaller.

    Args:
        fp16: compute in half precision on a GPU.
    """
    device = next(model.parameters()).device
    on_gpu = device.type != "cpu"
    if num_workers is None:  # starting processes costs more than a few hundred small images
        num_workers = count_spare_cores() if on_gpu and len(indices) * size**2 > 2e7 else 0
    threads = 1 if num_workers else torch.get_num_threads()
    views = EvaluationViews(source, indices, size, batch_size, resize, threads, model.preprocessing)
    batches = iterate(views, 0, len(views), num_workers, pin_memory=device.type == "cuda")
    pool = errors.look_up("pooling", pooling, POOLINGS)
    late: list[Features] = []  # on the device
    for runs, positions, bad in track(batches, len(views), progress) if progress else batches:
        with torch.autocast(device.type, torch.float16, enabled=fp16 and on_gpu):
            images = (normalize(distributed.send(run, device), model.preprocessing) for run in runs)
            values = [pool(model, run).float() for run in images]
        found = torch.cat(values) if values else torch.zeros(0, model.embed_dim)
        late.append(Features(found, np.array(positions, dtype=np.int64), bad))
        if len(late) > on_gpu:  # features leave a GPU one batch late, so that it never waits for the copy
            yield late[0]._replace(values=require_finite(late.pop(0).values.cpu(), model))
    yield from (part._replace(values=require_finite(part.values.cpu(), model)) for part in late)


@checked(EmbedOptions, "size")
def extract(
    model: Backbone,
    source: Source,
    size: int,
    indices: Sequence[int] | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    progress: str | None = None,
    pooling: Pooling = "cls",
    shared: bool = False,
    resize: Resize = "as trained",
) -> Features:
    """Features of the images of `source` (those at `indices`), in order, in float32 as the reference does.

    Args:
        size: edge of the evaluation view, pixels.
        batch_size: images at a time. None: 128, fewer of more than 224 pixels.
        progress: label of a progress bar on the terminal; None: no bar.
        pooling: how the model's outputs become a feature, see `POOLINGS`.
        shared: every rank computes its share and gets all of them; all ranks must call this.
        resize: how an image is brought to that size, see `dino.data.evaluation_views.RESIZES`.

    Raises:
        ValueError: a feature is not finite.
    """
    batch_size = batch_size or choose_batch_size(size)
    indices = range(len(source)) if indices is None else indices
    mine = indices
    if shared:  # each rank takes whole batches in turn, so that each is computed as it would be on one rank
        starts = range(distributed.rank() * batch_size, len(indices), distributed.world_size() * batch_size)
        mine = [index for start in starts for index in indices[start : start + batch_size]]
    batches = extract_batches(model, source, size, mine, batch_size, num_workers, progress, pooling, resize)
    shares = distributed.gather([*batches]) if shared else [[*batches]]
    in_order = [batch for turn in zip_longest(*shares) for batch in turn if batch is not None]
    return Features.concatenate(in_order, model.embed_dim)


def select_labels(source: Source, found: Features, what: str) -> Tensor:
    """[m] int64, of the images that could be read; the others are counted and one is named.

    Raises:
        ValueError: none could be read.
    """
    report_unreadable(found.bad, what)
    if not len(found.indices):
        raise ValueError(f"none of the {len(source)} {what} images can be read; check the data folder.")
    return torch.from_numpy(required(source.labels)[found.indices])


def report_unreadable(bad: Bad, what: str) -> None:
    if bad and distributed.is_main():
        print(f"{len(bad)} {what} images could not be read, first: {bad[0][0]} ({bad[0][1]})")
