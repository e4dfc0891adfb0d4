"""A student that learns what a frozen network sees: its features of the same views, of the image and of its patches.

The objective is the simplest that is published (FitNets, Romero et al. 2015; with cosines as in RADIO, Ranzinger et al.
2024): the student's tokens go through a head of its own to the width of the frozen network, and each should point where the
frozen network's token points. What all tokens share is subtracted first, else it would make all of them alike (`Center`).

Letters: n images, g global views, t tokens (1 + cells of the student), d width of the frozen network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dino.method import DINO, Center, Metrics, Network, at_least_float32
from dino.models import Backbone
from dino.models.preprocessing import Preprocessing
from dino.variants import TARGETS, feature_spread


class TokenNetwork(Network):
    """A network whose head reads every token."""

    def forward(self, groups: list[Tensor], drop_path_noise: list[Tensor] | None = None) -> Float[Tensor, "vn t d"]:
        backbone: Any = self.backbone
        noises = [()] * len(groups) if drop_path_noise is None else [(1, noise) for noise in drop_path_noise]
        tokens = torch.cat([backbone.tokens(images, *noise)[-1] for images, noise in zip(groups, noises, strict=True)])
        return self.head(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])


class Distillation(DINO):
    """Student, its moving average (which is evaluated and kept), and the frozen network, which no checkpoint holds.

    Args:
        frozen: gets the student's views, resized to whole patches of its own. None: this only has the sizes.
    """

    def __init__(
        self, student: TokenNetwork, teacher: TokenNetwork, frozen: Backbone | None, center_momentum: float = 0.9
    ):
        super().__init__(student, teacher, center_momentum, TARGETS["none"])
        self.cell_center = Center(self.out_dim, center_momentum)
        self._frozen: list[Any] = []  # in a list, so that it is no part of the state
        if isinstance(frozen, nn.Module):
            self._frozen = [frozen.eval().requires_grad_(False)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for network in self._frozen:
            network._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def teacher_targets(
        self, global_views: Float[Tensor, "gn c s s"], temp: float, parts: int = 1
    ) -> tuple[Float[Tensor, "g n t d"], Metrics]:
        tokens = torch.cat([self._see(views) for views in global_views.chunk(parts)])
        targets = torch.cat([tokens[:, :1] - self.center.value, tokens[:, 1:] - self.cell_center.value], dim=1)
        self.center.update(tokens[:, 0])
        self.cell_center.update(tokens[:, 1:].mean(dim=1))
        return targets.unflatten(0, (2, -1)), {"target_spread": feature_spread(tokens[:, 0])}

    def _see(self, views: Float[Tensor, "m c s s"]) -> Float[Tensor, "m t d"]:
        """The frozen network's tokens of views that were normalized for the student, on the student's grid."""
        frozen, size = self._frozen[0], views.shape[-1]
        student: Any = self.student.backbone
        images = renormalize(views, student.preprocessing, frozen.preprocessing)
        edge = max(1, round(size / frozen.patch_size)) * frozen.patch_size
        if edge != size:
            images = F.interpolate(images, (edge, edge), mode="bicubic", antialias=True)
        tokens = at_least_float32(frozen.tokens(images)[-1])
        cells = tokens[:, 1:].unflatten(1, frozen.grid(edge, edge)).permute(0, 3, 1, 2)
        cells = F.interpolate(cells, student.grid(size, size), mode="area")
        return torch.cat([tokens[:, :1], cells.flatten(2).transpose(1, 2)], dim=1)

    @torch.no_grad()
    def update_teacher(self, momentum: float, epoch_ends: bool = False) -> None:
        """The moving average sees no images here, so it takes the statistics of BatchNorm from the student, too."""
        super().update_teacher(momentum, epoch_ends)
        there = dict(self.student.named_buffers())
        for name, buffer in self.teacher.named_buffers():
            if buffer.is_floating_point():
                buffer.lerp_(there[name], 1 - momentum)
            else:
                buffer.copy_(there[name])

    def student_loss(self, student_scores: Float[Tensor, "gn t d"], targets: Float[Tensor, "g n t d"]) -> Tensor:
        """1 - cosine, half of it for the image's tokens and half for the cells'."""
        cosines = F.cosine_similarity(at_least_float32(student_scores), targets.flatten(0, 1), dim=-1)
        return 1 - (cosines[:, 0].mean() + cosines[:, 1:].mean()) / 2


def renormalize(images: Float[Tensor, "m c h w"], before: Preprocessing, after: Preprocessing) -> Tensor:
    """Images normalized as `before` says, normalized as `after` says."""
    if (before.mean, before.std) == (after.mean, after.std):
        return images
    mean, std, new_mean, new_std = (
        images.new_tensor(values)[:, None, None] for values in (before.mean, before.std, after.mean, after.std)
    )
    return (images * std + mean - new_mean) / new_std
