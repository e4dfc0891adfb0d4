"""`--fit`: how to compute a step within a given memory, from the tensors alive in a trial of a few images."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dino.data.views import group_views
from dino.engine import parallel
from dino.engine.step import Split, TrainingStep
from dino.machine import measure_memory_in_use
from dino.models import Recompute
from dino.options import required
from dino.options.train import TrainOptions

MARGIN = 1.1  # kernels' workspaces and fragmentation
WORKSPACE = 34e6  # bytes that cuBLAS takes for the render stream
KEPT = 0.3e9  # bytes that a CPU's allocator keeps after some dozens of steps, and the k-NN monitor's
OVERHEAD = 2  # cost of a part beside its images, in images

# Relative time of a step with activation checkpointing.
LONGER: dict[Recompute, float] = {"nothing": 1, "elementwise": 1.08, "blocks": 4 / 3}


class Peak(TorchDispatchMode):
    """Counts the bytes of tensors that are created inside it and alive at the same time, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {arg.untyped_storage()._cdata for arg in args if isinstance(arg, Tensor)}
        result = func(*args, **(kwargs or {}))

        def see(tensor: Tensor) -> None:
            storage = tensor.untyped_storage()
            if storage not in self._known and storage._cdata not in given:
                self._known.add(storage)
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._gone, storage.nbytes())

        tree_map_only(Tensor, see, result)
        return result

    def _gone(self, count: int) -> None:
        self.alive -= count


def measure_peak(work: Callable[[], object]) -> int:
    """Bytes that `work` has alive at most, beyond what there was before."""
    with Peak() as mode:
        work()
    return mode.peak


def try_step(step: TrainingStep, options: TrainOptions, images: int) -> int:
    """`measure_peak` of the gradients of a step of so many black images, of which stochastic depth drops nothing."""
    sizes, noises = options.views.sizes, step.backbone.num_drop_path
    views = [(len(sizes[g]), sizes[g.start]) for g in group_views(sizes)]
    groups = [torch.zeros(v * images, options.model.in_channels, s, s, device=step.device) for v, s in views]
    noise = [torch.zeros(noises, v, images, device=step.device) for v, _ in views] if noises else None
    return measure_peak(lambda: step.compute_gradients(groups, required(options.method.teacher_temp), noise))


def fit_memory(step: TrainingStep, options: TrainOptions, images: int, limit: int) -> tuple[Split, float]:
    """How to compute `step` of `images` (of one rank) within `limit` bytes, found by trying parts of a few images; and
    the bytes that takes.

    Raises:
        ValueError: there is no way.
    """
    method, device = step.method, step.device
    # Beside the parts: pixels as bytes and as floats; scores, logarithms and targets of two views; the optimizer.
    of_image = 5 * options.model.in_channels * sum(size**2 for size in options.views.sizes) + 24 * method.out_dim
    trained = [p for p in method.student.parameters() if p.requires_grad]
    learned = sum(p.numel() * p.element_size() for p in trained)
    fixed = learned * (2 if options.optim.name == "adamw" else 1) + images * of_image
    few = min(2, images)
    buffers = [buffer.clone() for buffer in method.buffers()]
    before = step.split

    def measure_part(count: int, recompute: Recompute) -> int:
        step.set_split(Split(1, recompute))
        return try_step(step, options, count)

    try:
        for p in trained:
            p.grad = torch.zeros_like(p)  # there throughout, so that they do not count as a part's
        # Memory is linear in the images of a part: two measurements give the line.
        lines: dict[Recompute, tuple[float, float]] = {}
        for recompute in step.backbone.recomputable:
            low, high = measure_part(few, recompute), measure_part(2 * few, recompute)
            lines[recompute] = (2 * low - high, (high - low) / few)
        # Measured now, with what the trial has left behind.
        fixed += measure_memory_in_use(device) + (KEPT if device.type == "cpu" else WORKSPACE)
        return choose_split(limit, images, fixed, lines, parts_allowed=not parallel.has_batch_norm(method))
    finally:
        step.set_split(before)
        step.optimizer.zero_grad(set_to_none=True)
        for buffer, value in zip(method.buffers(), buffers, strict=True):
            buffer.copy_(value)


def choose_split(
    limit: int, images: int, fixed: float, lines: dict[Recompute, tuple[float, float]], parts_allowed: bool
) -> tuple[Split, float]:
    """The fastest way to compute a step of `images` that stays within `limit` bytes, and the bytes it needs.

    Args:
        fixed: bytes whatever the way.
        lines: bytes that a part takes however small, and per image; by what is recomputed.
        parts_allowed: False where images must stay together.

    Raises:
        ValueError: there is none.
    """

    def needed(split: Split) -> float:
        base, per_image = lines[split.recompute]
        return fixed + MARGIN * max(0, base + per_image * -(-images // split.parts))

    def seconds(split: Split) -> float:
        return (images + OVERHEAD * split.parts) * LONGER[split.recompute]

    counts = sorted({-(-images // size) for size in range(1, images + 1)}) if parts_allowed else [1]
    ways = sorted((Split(parts, r) for parts in counts for r in lines), key=seconds)
    fitting = next((way for way in ways if needed(way) <= limit), None)
    if fitting is None:
        least = math.ceil(min(map(needed, ways)) / 1e8) / 10
        raise ValueError(
            f"even in the smallest parts a step needs about {least:.1f} GB, more than --fit allows; use a smaller model, "
            "smaller or fewer views, or a smaller --batch-size."
        )
    return fitting, needed(fitting)
