"""The training callback: k-NN if there are labels, scores without labels always, attention masks if the images are scenes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dino import distributed
from dino.data.evaluation_views import resize_and_crop
from dino.data.normalize import normalize
from dino.data.render import CpuRenderer
from dino.data.scenes import Scenes
from dino.data.sources import Images, Source, evenly_spaced, read_or_gray
from dino.data.views import draw_views
from dino.engine import health
from dino.eval import evaluate, knn
from dino.features.extract import EvaluationViews, Features, extract
from dino.look.attention import enlarge, jaccard, map_attention, mass_mask
from dino.method import DINO
from dino.models import Backbone
from dino.options import replace, required
from dino.options.train import ViewOptions
from dino.randomness import CHECKS

# At most so many images, so that a check takes much less time than an epoch; and 2 * PAIRS crops of each of CROPPED.
BANK, QUERIES, MASKS, CROPPED, PAIRS = 5000, 1000, 200, 300, 2


@dataclass
class OnlineEvaluation:
    """Measures the teacher's backbone on held-out images.

    Args:
        train: the source of the k-NN's bank.
        held_out: images to classify. None: only scores without labels are measured, on training images.
        views: of the training. The global views' size is that of the evaluation view.
        seed: of the crops that are drawn as those views are; they are the same at every check.
        more: other evaluations, over all ranks.
        pixels_done: the k-NN of the pixels themselves, which never changes, has been measured.
    """

    train: Source
    held_out: Source | None
    views: ViewOptions
    seed: int
    device: torch.device
    more: Sequence[evaluate.EvaluationCallback] = ()
    pixels_done: bool = False

    @property
    def size(self) -> int:
        return required(self.views.global_size)

    def __call__(self, method: DINO, step: int) -> dict[str, float]:
        backbone: Backbone = method.teacher.backbone  # pyright: ignore[reportAssignmentType]
        result = self._monitor(backbone) if distributed.is_main() else {}
        for evaluation in self.more:
            result |= evaluation(backbone, step)
        return result

    def _monitor(self, backbone: Backbone) -> dict[str, float]:
        images = self.train if self.held_out is None else self.held_out
        queries = extract(backbone, images, self.size, evenly_spaced(len(images), QUERIES))
        result = health.feature_health(queries.values) if len(queries.values) > 1 else {}
        if result:
            cropped = queries.indices[evenly_spaced(len(queries.indices), CROPPED)].tolist()
            crops = extract_crops(backbone, images, cropped, self.views, self.seed)
            found = [health.two_crop_retrieval(*pair) for pair in crops.permute(1, 2, 0, 3)]
            result |= {"rankme": health.rankme(queries.values), "lidar": health.lidar(crops.flatten(1, 2))}
            result["two_crop_retrieval"] = sum(found) / PAIRS
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


def extract_crops(model: Backbone, source: Source, positions: Sequence[int], views: ViewOptions, seed: int) -> Tensor:
    """Features [n, PAIRS, 2, d] of crops of the images at `positions`.

    A pair is the two global views of an epoch, of random numbers that the training does not use.
    """
    pair, renderer = replace(views, {"num_local": 0}), CpuRenderer()

    def draw(position: int) -> list[np.ndarray]:
        image = read_or_gray(source, position)
        shape = np.array([image.shape[:2]])
        drawn = (draw_views(pair, seed, CHECKS + i, [position], shape) for i in range(PAIRS))
        return [crop for each in drawn for crop in renderer.prepare([image], each)[0][:, 0].numpy()]

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        crops = [crop for found in pool.map(draw, positions) for crop in found]
    features = extract(model, Images(crops), required(views.global_size), num_workers=0, resize="shrunk").values
    return features.unflatten(0, (-1, PAIRS, 2))


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
