"""Batches of views by step number: item `s` is the batch of step `s`, whoever asks for it and whenever.

The order is keyed by (seed, epoch) and every view by (seed, epoch, sample). So the number of workers and ranks changes
nothing, and a resumed run starts at a later step.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, default_convert, get_worker_info

from dino import distributed
from dino.data.decode import BadImage
from dino.data.order import Order
from dino.data.ranges import Unreachable
from dino.data.render import Renderer
from dino.data.sources import Source, read_ahead
from dino.data.views import Views, draw_views
from dino.machine import check_workers
from dino.options.train import ViewOptions

MOST_UNREADABLE = 1000  # images in a row after which a batch is given up

T = TypeVar("T")
Bad = list[tuple[str, str]]  # images that cannot be read: name, reason
Read = Callable[[Source, int], Any]  # an image by position; raises BadImage


def read_pixels(source: Source, index: int) -> np.ndarray:
    return source.read(index)


class Batch(NamedTuple):
    prepared: list[Tensor]  # what `Renderer.prepare` returned; empty when an image had no readable stand-in
    views: Views | None  # their parameters
    bad: Bad


class ViewBatches(Dataset[Batch]):
    """Rank `rank` of `world_size` gets its contiguous share of every global batch, of which some may have one more."""

    def __init__(
        self,
        source: Source,
        options: ViewOptions,
        renderer: Renderer,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.source, self.options, self.renderer, self.seed = source, options, renderer, seed
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.steps_per_epoch, self.order = len(source) // batch_size, Order(source, seed)

    def indices(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the source of this rank's samples at `step`, and their numbers by which views are drawn."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        positions, numbers = self.order.visit(epoch, batch * self.batch_size, (batch + 1) * self.batch_size)
        return positions[self.share], numbers[self.share]

    @property
    def share(self) -> slice:
        """This rank's part of the global batch."""
        return distributed.split(self.batch_size, self.world_size)[self.rank]

    def __getitem__(self, step: int) -> Batch:
        return self._read_batch(step, self.renderer.read)

    def decode_batch(self, step: int) -> Batch:
        """The batch of `step`, decoded here even where the renderer leaves decoding to the device."""
        return self._read_batch(step, read_pixels)

    def _read_batch(self, step: int, read: Read) -> Batch:
        bad: Bad = []
        indices, numbers = self.indices(step)
        announce(self.source, lambda step: self.indices(step)[0].tolist(), step)
        found = [read_with_stand_in(self.source, int(index), bad, MOST_UNREADABLE, read) for index in indices]
        images = [entry[0] for entry in found if entry is not None]
        if len(images) < len(found):
            return Batch([], None, bad)
        shapes = np.array([image.shape[:2] for image in images])
        epoch = step // self.steps_per_epoch
        views = draw_views(self.options, self.seed, epoch, numbers.tolist(), shapes)
        return Batch(self.renderer.prepare(images, views), views, bad)


def announce(source: Source, find: Callable[[int], Sequence[int]], item: int) -> None:
    """Begin to read the images that item `item` needs, and those of the next item of this worker; `find` says which."""
    worker = get_worker_info()
    for coming in (item, item + (1 if worker is None else worker.num_workers)):
        if indices := find(coming):
            read_ahead(source, indices)


def read_with_stand_in(
    source: Source, index: int, bad: Bad, most: int, read: Read = read_pixels
) -> tuple[Any, int] | None:
    """The image at `index`, or the next readable one after it: the same stand-in for any worker or rank.

    Args:
        bad: gets the images that could not be read.
        most: images to try.

    Returns:
        The image and its position; None when none of them could be read.
    """
    for offset in range(min(len(source), most)):
        position = (index + offset) % len(source)
        try:
            return read(source, position), position
        except BadImage as error:
            bad.append((source.name(position), error.reason))
    return None


def _start_worker(_: int) -> None:
    """Workers leave signals to the training process and run one thread each."""
    for number in (signal.SIGINT, getattr(signal, "SIGUSR1", signal.SIGINT)):
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) is not signal.SIG_IGN:  # which `nohup` asks for
            signal.signal(number, signal.SIG_DFL)
    cv2.setNumThreads(0)


def _share(item: T) -> T:
    """Put the tensors of `item` into shared memory here, where a lack of it is an error; sent later, they would be lost."""
    return tree_map_only(Tensor, Tensor.share_memory_, default_convert(item))


class WorkerDied(Exception):
    """A data worker has ended; the message says how, and what may help."""


def iterate(batches: Dataset[T], start: int, stop: int, num_workers: int, pin_memory: bool) -> Iterator[T]:
    """Items `start` to `stop` - 1 of `batches`, in order, prepared ahead by `num_workers` processes.

    Raises:
        WorkerDied: one of these processes has ended.
        ValueError: they would be too many, or run this script again.
    """
    check_workers(num_workers)
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=num_workers,
        collate_fn=_share if num_workers else default_convert,
        worker_init_fn=_start_worker if num_workers else None,
        pin_memory=pin_memory,
    )
    on_death = getattr(signal, "SIGCHLD", None)  # Windows has none
    before = on_death and signal.getsignal(on_death)
    items = iter(loader)
    if on_death and threading.current_thread() is threading.main_thread():
        signal.signal(on_death, before)  # PyTorch's handler raises an error wherever this process is, within a step too
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except Unreachable as error:  # of a worker, whose trace PyTorch puts before the sentence
            raise Unreachable(str(error).strip().rpartition("Unreachable: ")[2]) from None
        except Exception as error:
            if reason := _find_dead_worker(getattr(items, "_workers", ()), error):
                raise WorkerDied(reason) from error
            raise
        yield item


def _find_dead_worker(workers: Iterable[BaseProcess], error: Exception) -> str:
    """How a worker has ended, if `error` comes from that; else ""."""
    how, of_memory = "", "shared memory" in str(error)
    for worker in workers:
        worker.join(0.1)
        if code := worker.exitcode:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            of_memory |= how.endswith(("SIGKILL", "SIGBUS"))
    if of_memory:
        memory = "most likely memory ran out, or /dev/shm is too small (docker run --shm-size=8g)"
        return f"a data worker {how or 'found no space in shared memory'}; {memory}: use fewer --data.num-workers, or 0"
    return how and f"a data worker {how}; if nobody stopped it, --data.num-workers 0 shows the error"
