"""What is measured while a run goes on: k-NN where there are labels, label-free health always, masks where drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dino import distributed
from dino.data.evaluation_views import resize_and_crop
from dino.data.normalize import normalize
from dino.data.scenes import Scenes
from dino.data.sources import Source, evenly_spaced
from dino.engine.monitor import feature_health
from dino.eval import evaluate, knn
from dino.features.extract import extract
from dino.look.attention import enlarge, jaccard, map_attention, mass_mask
from dino.method import DINO
from dino.models import Backbone
from dino.options import required

BANK, QUERIES, MASKS = 5000, 1000, 200  # at most so many images, so that a check stays short beside an epoch


class OnlineEvaluation:
    """The training callback: measures the teacher's backbone on held-out images.

    Args:
        train: the k-NN's labeled bank comes from here (evenly spaced, at most 5000 images).
        held_out: what is classified; None measures label-free health on training images.
        size: edge of the evaluation view, pixels.
        more: evaluations to make beside, over all ranks.
    """

    def __init__(
        self,
        train: Source,
        held_out: Source | None,
        size: int,
        device: torch.device,
        more: Sequence[evaluate.EvaluationCallback] = (),
    ):
        self.train, self.held_out, self.size, self.device, self.more = train, held_out, size, device, more
        self.labeled = held_out is not None and train.labels is not None and held_out.labels is not None
        self.pixels_done = False

    def __call__(self, method: DINO, step: int) -> dict[str, float]:
        backbone: Backbone = method.teacher.backbone  # pyright: ignore[reportAssignmentType]
        result = self._monitor(backbone) if distributed.is_main() else {}
        for evaluation in self.more:
            result |= evaluation(backbone, step)
        return result

    def _monitor(self, backbone: Backbone) -> dict[str, float]:
        shown = self.held_out if self.held_out is not None else self.train
        queries = extract(backbone, shown, self.size, self.device, evenly_spaced(len(shown), QUERIES))
        result = feature_health(queries.values) if len(queries.values) > 1 else {}
        if self.labeled and self.held_out is not None:
            bank = extract(backbone, self.train, self.size, self.device, evenly_spaced(len(self.train), BANK))
            result |= self._knn(bank.values, bank.indices, queries.values, queries.indices)
            if not self.pixels_done:
                result |= self._pixel_knn(bank.indices, queries.indices)
                self.pixels_done = True
        if isinstance(shown, Scenes) and backbone.has_attention:
            result |= scene_masks(backbone, shown, self.size, self.device)
        return result

    def _knn(self, bank: Tensor, b: np.ndarray, queries: Tensor, q: np.ndarray) -> dict[str, float]:
        bank_labels = torch.from_numpy(required(self.train.labels)[b])
        labels = torch.from_numpy(required(required(self.held_out).labels)[q])
        has_label, asked = bank_labels >= 0, labels >= 0
        if has_label.sum() < min(knn.KS) or not asked.any():
            return {}
        return knn.classify(bank[has_label], bank_labels[has_label], queries[asked], labels[asked])

    def _pixel_knn(self, b: np.ndarray, q: np.ndarray) -> dict[str, float]:
        """The floor to beat: the same vote on the pixels themselves, at most 64 x 64."""
        edge = min(self.size, 64)
        bank, queries = pixels(self.train, b, edge), pixels(required(self.held_out), q, edge)
        return {f"pixels_{name}": value for name, value in self._knn(bank, b, queries, q).items()}


def pixels(source: Source, indices: np.ndarray, edge: int) -> Tensor:
    """Normalized pixels of evaluation views as features [m, 3 * edge * edge]."""
    images = np.stack([resize_and_crop(source.read(int(i)), edge) for i in indices])
    return normalize(torch.from_numpy(images)[None]).flatten(1)


@torch.no_grad()
def scene_masks(model: Backbone, scenes: Scenes, size: int, device: torch.device) -> dict[str, float]:
    """Jaccard overlap, in percent, of 60 %-mass attention masks with the drawn objects (paper Fig. 4).

    Looked at with twice the `size` of training, as the paper does (480 pixels after 224): finer maps of the same things.
    `best head` picks for each image the head that overlaps most, as the paper does; `mean head` averages over heads.
    """
    chosen, size = evenly_spaced(len(scenes), MASKS), 2 * size
    scenes = scenes.at(size)
    images = torch.from_numpy(np.stack([resize_and_crop(scenes.read(i), size) for i in chosen]))[None]
    truth = torch.from_numpy(np.stack([scenes.mask(i) for i in chosen]))
    views = normalize(images.to(device), model.in_channels)
    masks = mass_mask(map_attention(model, views).float().cpu())
    overlap = jaccard(enlarge(masks, (truth.shape[-2], truth.shape[-1])) > 0, truth[:, None])
    best, mean = overlap.max(dim=1).values.mean(), overlap.mean()
    return {"jaccard_best_head": 100 * best.item(), "jaccard_mean_head": 100 * mean.item()}
