"""Batches of views by step number: item `s` is what step `s` of the run sees, whoever asks and whenever.

The order is a permutation keyed by (seed, epoch) and every view is keyed by (seed, epoch, sample), so the number of
workers and ranks changes nothing, and a resume is a matter of starting at another step.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dino.data.decode import BadImage
from dino.data.sources import Source
from dino.data.views import Views, draw_views
from dino.options.train import ViewOptions
from dino.randomness import Stream, open_stream

FARTHEST_STAND_IN = 1000  # unreadable images in a row after which a batch is given up


Read = Callable[[Source, int], Any]  # an image, or what a device makes one of; has its `shape`
Prepare = Callable[[Sequence[Any], Views], list[Tensor]]  # of what was read


class Batch(NamedTuple):
    prepared: list[Tensor]  # views, or what a device makes them of; empty when no stand-in could be read either
    views: Views | None  # their parameters
    bad: list[tuple[str, str]]  # images that could not be read: name, reason


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """The order in which epoch `epoch` visits the images: a permutation of 0..num_images-1."""
    return open_stream(Stream.ORDER, seed, epoch).permutation(num_images)


def read_pixels(source: Source, index: int) -> np.ndarray:
    return source.read(index)


class ViewBatches(Dataset[Batch]):
    """Rank `rank` of `world_size` gets its contiguous share of every global batch.

    `prepare` is the worker's share of the rendering: all of it (`CpuRenderer`), or what a device needs (`pack`); `read`
    is its share of the decoding: all of it, or what `dino.data.device_decode` leaves to it.
    """

    def __init__(
        self,
        source: Source,
        options: ViewOptions,
        prepare: Prepare,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        read: Read = read_pixels,
    ):
        self.source, self.options, self.prepare, self.seed = source, options, prepare, seed
        self.batch_size, self.rank, self.world_size, self.read = batch_size, rank, world_size, read
        self.steps_per_epoch = len(source) // batch_size
        assert options.global_size is not None
        assert options.local_size is not None
        self.sizes = (options.global_size,) * 2 + (options.local_size,) * options.num_local

    def indices(self, step: int) -> np.ndarray:
        """Positions in the source of this rank's samples at `step`."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.seed, epoch, len(self.source))
        return order[batch * self.batch_size : (batch + 1) * self.batch_size][self.share]

    @property
    def share(self) -> slice:
        """This rank's part of the global batch."""
        size = self.batch_size // self.world_size
        return slice(self.rank * size, (self.rank + 1) * size)

    def __getitem__(self, step: int) -> Batch:
        return self._batch(step, self.read)

    def decoded(self, step: int) -> Batch:
        """The batch of `step`, decoded here whatever `read` leaves to a device."""
        return self._batch(step, read_pixels)

    def _batch(self, step: int, read: Read) -> Batch:
        bad: list[tuple[str, str]] = []
        indices = self.indices(step)
        images = [image for index in indices if (image := self._try(read, int(index), bad)) is not None]
        if len(images) < len(indices):
            return Batch([], None, bad)
        shapes = np.array([image.shape[:2] for image in images])
        epoch = step // self.steps_per_epoch
        views = draw_views(self.options, self.sizes, self.seed, epoch, indices.tolist(), shapes)
        return Batch(self.prepare(images, views), views, bad)

    def _try(self, read: Read, index: int, bad: list[tuple[str, str]]) -> Any:
        """The image at `index`, or the next readable one after it: the same stand-in for any worker or rank."""
        for offset in range(min(len(self.source), FARTHEST_STAND_IN)):
            position = (index + offset) % len(self.source)
            try:
                return read(self.source, position)
            except BadImage as error:
                bad.append((self.source.name(position), error.reason))
        return None


def start_worker(_: int) -> None:
    """Workers leave signals to the training process and run one thread each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    cv2.setNumThreads(0)


def iterate(batches: ViewBatches, start: int, stop: int, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Batches of steps `start` to `stop` - 1, prepared ahead by `num_workers` processes."""
    return iter(
        DataLoader(
            batches,
            batch_size=None,
            sampler=range(start, stop),
            num_workers=num_workers,
            worker_init_fn=start_worker if num_workers else None,
            pin_memory=pin_memory,
            prefetch_factor=2 if num_workers else None,
        )
    )
