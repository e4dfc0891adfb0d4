"""The training callback: k-NN if there are labels, feature health always, attention masks if the images are scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dino import distributed
from dino.data.evaluation_views import resize_and_crop
from dino.data.normalize import normalize
from dino.data.scenes import Scenes
from dino.data.sources import Source, evenly_spaced
from dino.engine.monitor import feature_health
from dino.eval import evaluate, knn
from dino.features.extract import EvaluationViews, Features, extract
from dino.look.attention import enlarge, jaccard, map_attention, mass_mask
from dino.method import DINO
from dino.models import Backbone
from dino.options import required

BANK, QUERIES, MASKS = 5000, 1000, 200  # at most so many images, so that a check takes much less time than an epoch


@dataclass
class OnlineEvaluation:
    """Measures the teacher's backbone on held-out images.

    Args:
        train: the source of the k-NN's bank.
        held_out: images to classify. None: only feature health is measured, on training images.
        size: edge of the evaluation view, pixels.
        more: other evaluations, over all ranks.
        pixels_done: the k-NN of the pixels themselves, which never changes, has been measured.
    """

    train: Source
    held_out: Source | None
    size: int
    device: torch.device
    more: Sequence[evaluate.EvaluationCallback] = ()
    pixels_done: bool = False

    def __call__(self, method: DINO, step: int) -> dict[str, float]:
        backbone: Backbone = method.teacher.backbone  # pyright: ignore[reportAssignmentType]
        result = self._monitor(backbone) if distributed.is_main() else {}
        for evaluation in self.more:
            result |= evaluation(backbone, step)
        return result

    def _monitor(self, backbone: Backbone) -> dict[str, float]:
        images = self.train if self.held_out is None else self.held_out
        queries = extract(backbone, images, self.size, evenly_spaced(len(images), QUERIES))
        result = feature_health(queries.values) if len(queries.values) > 1 else {}
        if self.held_out is not None and self.held_out.labels is not None and self.train.labels is not None:
            bank = extract(backbone, self.train, self.size, evenly_spaced(len(self.train), BANK))
            result |= self._knn(bank, queries)
            if not self.pixels_done:  # a floor to beat: the same vote on the pixels themselves
                edge = min(self.size, 64)
                pixels = flatten_pixels(self.train, bank, edge), flatten_pixels(self.held_out, queries, edge)
                result |= {f"pixels_{name}": value for name, value in self._knn(*pixels).items()}
                self.pixels_done = True
        if isinstance(images, Scenes) and backbone.has_attention:
            result |= measure_scene_masks(backbone, images, self.size, self.device)
        return result

    def _knn(self, bank: Features, queries: Features) -> dict[str, float]:
        bank_labels = torch.from_numpy(required(self.train.labels)[bank.indices])
        labels = torch.from_numpy(required(required(self.held_out).labels)[queries.indices])
        has_label, asked = bank_labels >= 0, labels >= 0
        if has_label.sum() < min(knn.KS) or not asked.any():
            return {}
        return knn.classify(bank.values[has_label], bank_labels[has_label], queries.values[asked], labels[asked])


def flatten_pixels(source: Source, found: Features, edge: int) -> Features:
    """Normalized pixels of evaluation views of the same images, as features [m, 3 * edge * edge], if they can be read."""
    views = EvaluationViews(source, found.indices.tolist(), edge, len(found.indices), "center", torch.get_num_threads())
    runs, indices, bad = views[0]
    values = normalize(runs[0]).flatten(1) if runs else torch.zeros(0, 3 * edge**2)
    return Features(values, np.array(indices, np.int64), bad)


@torch.no_grad()
def measure_scene_masks(model: Backbone, scenes: Scenes, size: int, device: torch.device) -> dict[str, float]:
    """Jaccard overlap, in percent, of 60 %-mass attention masks with the drawn objects (paper Fig. 4).

    Scenes are drawn at twice the `size` of training, for finer maps; the paper uses 480 pixels after 224. `best_head` takes
    for each image the head that overlaps most, as the paper does; `mean_head` averages over heads.
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
