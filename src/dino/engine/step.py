"""One training step in the reference's order (main_dino.py, train_one_epoch), without files or terminal.

The trainer, the golden traces, `dino bench` and the benchmarks all call `TrainingStep`. A step can be computed in parts
(gradient accumulation) and with activation checkpointing: the same gradients in less memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from dino import distributed
from dino.data.views import group_views
from dino.engine import optim, parallel
from dino.method import DINO, Metrics
from dino.models import Backbone, Recompute
from dino.randomness import Stream, open_stream


class Rates(NamedTuple):
    """What the schedules give for one step."""

    lr: float
    weight_decay: float
    momentum: float  # of the teacher
    teacher_temp: float
    freeze_last_layer: bool = False  # leave the prototypes where they are
    freeze_backbone: bool = False  # only the head learns
    epoch_ends: bool = False  # with this step


class Split(NamedTuple):
    """How a step is computed."""

    parts: int = 1
    recompute: Recompute = "nothing"


class TrainingStep:
    """A method, its optimizer, and how a step of them is computed.

    Args:
        clip_grad: largest norm of each parameter's gradient; 0: not clipped.
        weight: of this rank's images, which may be more than another's, in the mean over ranks; their mean is 1.
    """

    def __init__(
        self,
        method: DINO,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        precision: str = "fp32",
        clip_grad: float = 3.0,
        weight: float = 1.0,
    ):
        self.method, self.optimizer, self.device = method, optimizer, device
        self.precision, self.clip_grad, self.weight = precision, clip_grad, weight
        # Entered with the name of each part of a step; `dino bench` sets one that measures.
        self.time: Callable[[str], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
        self.watch: Callable[[Tensor], None] | None = None  # is shown the targets of each step
        self.student: nn.Module = method.student
        self.sharded = False  # networks are spread over ranks
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.split = Split()

    @property
    def backbone(self) -> Backbone:
        return cast(Backbone, self.method.student.backbone)

    def set_split(self, split: Split) -> None:
        """Choose how the following steps are computed."""
        assert split.parts == 1 or not parallel.has_batch_norm(self.method)
        self.split = split
        self.backbone.set_recompute(split.recompute)

    def distribute(self) -> None:
        """Average the gradients of the following steps over ranks."""
        self.student = parallel.distribute(self.method.student, self.device)

    def __call__(self, groups: list[Tensor], rates: Rates, drop_path_noise: list[Tensor] | None = None) -> Metrics:
        """Take one step; returns its metrics, which stay on the device.

        Args:
            groups: normalized views of equal resolution, view-major [v * n, c, s, s]; the first are the 2 global views.
            drop_path_noise: see `draw_drop_path_noise`.
        """
        method, optimizer = self.method, self.optimizer
        optim.set_rates(optimizer, rates.lr, rates.weight_decay)
        optimizer.zero_grad(set_to_none=True)
        loss, metrics = self.compute_gradients(groups, rates.teacher_temp, drop_path_noise)
        with self.time("optimizer"):
            self.scaler.unscale_(optimizer)
            grad_norm = optim.clip_per_parameter_(method.student.parameters(), self.clip_grad)
            if rates.freeze_last_layer:
                method.cancel_last_layer_gradients()
            if rates.freeze_backbone:
                self.method.student.backbone.zero_grad(set_to_none=True)
            self.scaler.step(optimizer)
            self.scaler.update()
        with self.time("EMA"):
            method.update_teacher(rates.momentum, rates.epoch_ends)
        return {"loss": loss, **metrics, "grad_norm": grad_norm}

    def compute_gradients(
        self, groups: list[Tensor], teacher_temp: float, drop_path_noise: list[Tensor] | None = None
    ) -> tuple[Tensor, Metrics]:
        """The loss, its (scaled) gradients and the teacher's metrics. Teacher and center once; the student in parts."""
        images = len(groups[0]) // 2
        parts = distributed.split(images, self.split.parts)
        with self.time("teacher"), self._autocast():
            targets, metrics = self.method.teacher_targets(groups[0], teacher_temp, len(parts))
            if self.watch is not None:
                self.watch(targets)
        losses = []
        for part in parts:
            with parallel.without_sync(self.student, part != parts[-1]):
                with self.time("student"), self._autocast():
                    noise = None if drop_path_noise is None else slice_noise(drop_path_noise, part)
                    scores = self.student(slice_views(groups, part, images), noise)
                    loss = self.method.student_loss(scores, targets[:, part]) * ((part.stop - part.start) / images)
                with self.time("backward"):
                    self.scaler.scale(loss * self.weight).backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum(), metrics

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        # Its cache would keep weights in 16 bits of all blocks of a sharded network, where they are to be whole one by one.
        keeps_all = self.sharded and self.split.recompute == "blocks"
        return parallel.autocast(self.device, self.precision, cache=not keeps_all)


def slice_views(groups: Sequence[Tensor], images: slice, total: int) -> list[Tensor]:
    """The views of some of the `total` images in view-major groups, view-major again."""
    return [group.unflatten(0, (-1, total))[:, images].flatten(0, 1) for group in groups]


def slice_noise(noise: Sequence[Tensor], images: slice) -> list[Tensor]:
    """The drop-path noise of some of the images, as the student takes it: [num, v * images] by group."""
    return [group[:, :, images].flatten(1) for group in noise]


def draw_drop_path_noise(
    seed: int, step: int, num: int, sizes: Sequence[int], batch_size: int, images: slice, device: torch.device
) -> list[Tensor]:
    """Uniform numbers in [0, 1) by which stochastic depth drops branches: float32 [num, v, images] by group of views.

    They are drawn for the global batch, so that the same branches of the same views are dropped whatever the number of
    ranks and the parts of a step.

    Args:
        num: branches of the student.
        sizes: edges of the views, pixels.
        batch_size: images of the global batch; `images` are this rank's.
    """
    shape = (num, len(sizes), batch_size)
    own = torch.from_numpy(open_stream(Stream.DROP_PATH, seed, index=step).random(shape, "float32"))[:, :, images]
    drawn = [own[:, group].contiguous() for group in group_views(sizes)]
    if device.type == "cuda":  # copies of unpinned memory would wait for the step before
        drawn = [group.pin_memory() for group in drawn]
    return [distributed.send(group, device) for group in drawn]
