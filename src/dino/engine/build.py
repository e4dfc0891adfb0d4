"""From options to schedules in steps, and to the method with its two networks."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from dataclasses import dataclass
from typing import Any

import torch

from dino import schedules
from dino.data.sources import evenly_spaced
from dino.distillation import Distillation, TokenNetwork
from dino.engine.step import Rates
from dino.machine import check_memory
from dino.method import DINO, Network
from dino.models import Backbone, Head, ImageSizeError, create
from dino.options import required
from dino.options.train import TrainOptions, ViewOptions
from dino.randomness import seed_weights
from dino.variants import combine


@dataclass(frozen=True)
class Plan:
    """Options in epochs, turned into steps once."""

    options: TrainOptions
    steps_per_epoch: int

    @property
    def total(self) -> int:
        return max(1, self.steps(self.options.epochs))

    @property
    def measure_every(self) -> int:
        """Steps between checks."""
        every = required(self.options.log.knn_every)
        return max(1, self.steps(every)) if every else sys.maxsize

    @functools.cached_property
    def kept_teachers(self) -> set[int]:
        """Steps after which the teacher is kept for good; 0 is before the first."""
        return {*evenly_spaced(self.total + 1, self.options.log.keep_teachers)}

    def steps(self, epochs: float | None) -> int:
        return round(required(epochs) * self.steps_per_epoch)

    def rates(self, step: int) -> Rates:
        options, optim, method = self.options, self.options.optim, self.options.method
        total, epoch = self.total, step // self.steps_per_epoch
        peak = required(optim.lr) * required(options.batch_size) / 256
        start, end = required(method.teacher_temp_start), required(method.teacher_temp)
        warmup = required(method.teacher_temp_epochs)
        # As in the reference the temperature rises epoch by epoch; within the first one, if it must have risen by then.
        unit, warmup = (epoch, math.ceil(warmup)) if warmup >= 1 else (step, self.steps(warmup))
        return Rates(
            lr=schedules.warmup_cosine(step, total, peak, optim.min_lr, self.steps(optim.warmup_epochs)),
            weight_decay=schedules.cosine(step, total, optim.weight_decay, optim.weight_decay_end),
            momentum=schedules.cosine(step, total, method.momentum or 0.0, 1.0),
            teacher_temp=schedules.linear_then_constant(unit, start, end, warmup),
            freeze_backbone=step < self.steps(options.start.frozen_epochs or 0.0),
            freeze_last_layer=step < min(self.steps(optim.freeze_last_layer), total // 3),
            epoch_ends=(step + 1) % self.steps_per_epoch == 0,
        )


def model_arguments(options: TrainOptions) -> dict[str, Any]:
    """The arguments of `dino.models.create` that rebuild this run's backbone."""
    sizes = {name: value for name, value in vars(options.model).items() if name != "drop_path"}
    return sizes | {"image_size": options.views.global_size}


def build_method(options: TrainOptions, frozen: Backbone | None = None) -> DINO:
    """Student and teacher with fresh weights drawn from the seed.

    Args:
        frozen: the network whose features the student learns, where the options name one; not needed to know sizes.

    Raises:
        ValueError: the architecture does not exist, or cannot take views of these sizes.
    """
    h, m = options.head, options.method
    seed_weights(options.seed)

    def network(drop_path: float, **own: bool) -> Network:
        try:
            backbone = create(**model_arguments(options), drop_path=drop_path)
        except ImageSizeError as error:
            raise ValueError(f"views.global_size is {options.views.global_size}: {error}") from error
        check_views(backbone, options.views)
        arguments: dict[str, Any] = vars(h) | {"out_dim": h.out_dim or 1} | own
        head = Head(backbone.embed_dim, **arguments)
        return (TokenNetwork if m.frozen else Network)(backbone, head)

    student = network(required(options.model.drop_path))
    teacher = network(0.0, norm_last_layer=True, predictor=False)
    if isinstance(student, TokenNetwork) and isinstance(teacher, TokenNetwork):
        return Distillation(student, teacher, frozen, m.center_momentum)
    rules = (required(m.targets), required(m.loss), m.teacher)
    sizes = required(m.queue_size), required(options.batch_size)
    return combine(student, teacher, *rules, required(m.student_temp), m.center_momentum, *sizes)


def check_size(options: TrainOptions, images: int, on_gpu: bool) -> None:
    """Refuse networks and steps of `images` (of one rank) that do not fit this machine's memory, before it is taken.

    Counted are student, teacher and the views' pixels; on a CPU also the gradients, the optimizer's two moments, and the
    scores of the prototypes with what is computed from them (22 numbers of an image with 4 views, as measured). Features
    take more still.
    """
    sizes, prototypes = options.views.sizes, options.head.out_dim or 0
    needed = 12 * images * sum(size**2 for size in sizes)
    if not on_gpu:  # one part of a step at a time; `fit` may choose parts of one image
        part = 1 if options.fit else images // options.accumulate
        needed += 4 * prototypes * part * (4 * len(sizes) + 6)
    # Some of timm's architectures cannot be built without memory.
    with torch.device("meta"), contextlib.suppress(RuntimeError, NotImplementedError):
        of_number = 4 if on_gpu or options.shard != "none" else 10
        needed += sum(p.numel() for p in build_method(options).parameters()) * of_number
    check_memory(needed, f"training this model on {images} images at a time")


def check_views(backbone: Backbone, views: ViewOptions) -> None:
    """Refuse local views that the backbone cannot take; it was built for the global ones."""
    size = required(views.local_size)
    try:
        if views.num_local:
            backbone.grid(size, size)
    except ValueError as error:
        raise ValueError(f"views.local_size is {size}: {error} Or use no local views: --views.num-local 0.") from error
