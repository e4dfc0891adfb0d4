"""The training callback: k-NN if there are labels, scores without labels always, attention masks if the images are scenes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino import distributed
from dino.data.evaluation_views import resize_and_crop
from dino.data.image_files import Images
from dino.data.normalize import normalize
from dino.data.render import CpuRenderer
from dino.data.scenes import Scenes
from dino.data.sources import Source, evenly_spaced, read_or_gray
from dino.data.views import draw_views
from dino.engine import health
from dino.eval import evaluate, knn
from dino.eval.floors import BANK, COLORS, LARGEST, QUERIES, count_colors, flatten_pixels, read_views
from dino.features.extract import Features, extract
from dino.look.attention import enlarge, jaccard, map_attention, mass_mask
from dino.models import Backbone
from dino.options import replace, required
from dino.options.train import ViewOptions
from dino.randomness import CHECKS

MASKS, CROPPED = 200, 200  # images at most, of scenes, and of which two crops are compared
NEAREST = 10  # images that are compared


@dataclass
class OnlineEvaluation:
    """Measures the teacher's backbone on held-out images.

    Args:
        train: the source of the k-NN's bank.
        held_out: images to classify. None: only scores without labels are measured, on training images.
        views: of the training. The global views' size is that of the evaluation view.
        seed: of the crops that are drawn as those views are; they are the same at every check.
        more: other evaluations, over all ranks.
        floors_done: the k-NN of pixels and of color histograms, which never changes, has been measured.
        colors: color histograms of the images that are measured; None: not counted yet.
        starts_trained: the run starts from weights; then it is measured how far the features drift from theirs.
        start: features of the weights that the run started from, [n, d]; None: not measured yet.
    """

    train: Source
    held_out: Source | None
    views: ViewOptions
    seed: int
    device: torch.device
    more: Sequence[evaluate.EvaluationCallback] = ()
    floors_done: bool = False
    colors: Features | None = None
    starts_trained: bool = False
    start: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start = state_dict.get("start")

    @property
    def size(self) -> int:
        return required(self.views.global_size)

    def __call__(self, backbone: Backbone, step: int) -> dict[str, float]:
        result = self._monitor(backbone, step) if distributed.is_main() else {}
        for evaluation in self.more:
            result |= evaluation(backbone, step)
        return result

    def _monitor(self, backbone: Backbone, step: int) -> dict[str, float]:
        images = self.train if self.held_out is None else self.held_out
        queries = extract(backbone, images, self.size, evenly_spaced(len(images), QUERIES))
        result = health.feature_health(queries.values) if len(queries.values) > 1 else {}
        if self.starts_trained and step == 0:
            self.start = queries.values
        if self.start is not None and len(self.start) == len(queries.values):
            result["cka_start"] = health.linear_cka(self.start, queries.values)
        if result:
            cropped = queries.indices[evenly_spaced(len(queries.indices), CROPPED)].tolist()
            crops = extract_crops(backbone, images, cropped, self.views, self.seed)
            result["two_crop_retrieval"] = health.two_crop_retrieval(*crops.unbind(dim=1))
        edge = min(self.size, LARGEST)
        views = None if self.colors else read_views(images, queries.indices, edge)
        self.colors = self.colors or count_colors(required(views))
        result |= measure_color_agreement(queries, self.colors)
        if self.held_out is not None and self.held_out.labels is not None and self.train.labels is not None:
            bank = extract(backbone, self.train, self.size, evenly_spaced(len(self.train), BANK))
            result |= self._knn(bank, queries)
            if not self.floors_done and views is not None:  # floors to beat: the same vote on what needs no training
                known = read_views(self.train, bank.indices, edge)
                for name, describe in (("pixels", flatten_pixels), ("colors", count_colors)):
                    floor = self._knn(describe(known), describe(views))
                    result |= {f"{name}_{key}": value for key, value in floor.items() if key != "knn_queries"}
                self.floors_done = True
        if isinstance(images, Scenes) and backbone.has_attention:
            result |= measure_scene_masks(backbone, images, self.size, self.device)
        return result

    def _knn(self, bank: Features, queries: Features) -> dict[str, float]:
        bank_labels = torch.from_numpy(required(self.train.labels)[bank.indices])
        labels = torch.from_numpy(required(required(self.held_out).labels)[queries.indices])
        has_label, asked = bank_labels >= 0, labels >= 0
        if has_label.sum() < min(knn.KS) or not asked.any():
            return {}
        found = knn.classify(bank.values[has_label], bank_labels[has_label], queries.values[asked], labels[asked])
        return found | {"knn_queries": int(asked.sum())}


def extract_crops(model: Backbone, source: Source, positions: Sequence[int], views: ViewOptions, seed: int) -> Tensor:
    """Features [n, 2, d] of two crops of each of the images at `positions`.

    They are the global views of an epoch, of random numbers that the training does not use.
    """
    pair, renderer = replace(views, {"num_local": 0}), CpuRenderer()

    def draw(position: int) -> list[np.ndarray]:
        image = read_or_gray(source, position)
        drawn = draw_views(pair, seed, CHECKS, [position], np.array([image.shape[:2]]))
        return [*renderer.prepare([image], drawn)[0][:, 0].numpy()]

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        crops = [crop for found in pool.map(draw, positions) for crop in found]
    features = extract(model, Images(crops), required(views.global_size), num_workers=0, resize="shrunk").values
    return features.unflatten(0, (-1, 2))


def measure_color_agreement(features: Features, colors: Features) -> dict[str, float]:
    """Of each image's nearest others by feature, the share that is among its nearest by color histogram, in percent.

    `color_agreement_chance` is the share where both have nothing to do with each other. Nothing where images are gray, or
    too few.
    """
    _, rows, others = np.intersect1d(features.indices, colors.indices, return_indices=True)
    k = min(NEAREST, len(rows) // 10)  # of few images, few are near
    grays = colors.values[:, :: COLORS // 7]
    if k == 0 or grays.square().sum(dim=1).mean() > 0.99:
        return {}
    near = []
    for values in (features.values[rows], colors.values[others]):
        values = F.normalize(values, dim=1)
        alike = (values @ values.T).fill_diagonal_(-2)
        near.append(torch.zeros_like(alike).scatter_(1, alike.topk(k, dim=1).indices, 1.0))
    agreement = (near[0] * near[1]).sum().item() / (k * len(rows))
    return {"color_agreement": 100 * agreement, "color_agreement_chance": 100 * k / (len(rows) - 1)}


@torch.no_grad()
def measure_scene_masks(model: Backbone, scenes: Scenes, size: int, device: torch.device) -> dict[str, float]:
    """Jaccard overlap, in percent, of 60 %-mass attention masks with the drawn objects (paper Fig. 4).

    Scenes are drawn at twice the `size` of training, for finer maps; the paper uses 480 pixels after 224. `best_head` takes
    for each image the head that overlaps most, as the paper does; `mean_head` averages over heads; `mean_map` is the one
    mask of the mean of the heads' maps, which may overlap more than any head's.
    """
    chosen, size = evenly_spaced(len(scenes), MASKS), 2 * size
    scenes = scenes.at(size)
    images = torch.from_numpy(np.stack([resize_and_crop(scenes.read(i), size) for i in chosen]))[None]
    truth = torch.from_numpy(np.stack([scenes.mask(i) for i in chosen]))
    maps = map_attention(model, normalize(images.to(device), model.preprocessing)).float().cpu()
    masks = mass_mask(torch.cat([maps, maps.mean(dim=1, keepdim=True)], dim=1))
    overlap = jaccard(enlarge(masks, (truth.shape[-2], truth.shape[-1])) > 0, truth[:, None])
    heads, mean_map = overlap[:, :-1], overlap[:, -1]
    named = {"best_head": heads.amax(dim=1), "mean_head": heads, "mean_map": mean_map}
    return {f"jaccard_{name}": 100 * values.mean().item() for name, values in named.items()}
