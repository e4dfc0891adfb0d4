"""Weighted k-nearest-neighbor classification on frozen features (paper section 4.1 and appendix F.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino.data.open import open_labeled_pair
from dino.data.sources import Source, evenly_spaced
from dino.engine.health import measure_margin
from dino.eval.evaluate import Result
from dino.eval.floors import BANK, LARGEST, QUERIES, describe_plainly, read_views
from dino.features import cache
from dino.features.neighbors import find_neighbors, split_rows, vote
from dino.models import Backbone
from dino.options import required
from dino.options.evaluate import KnnOptions

KS = (10, 20, 100, 200)
SAME = 1e-6  # 1 - cosine of two features of one image, at most


def classify(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, ks: Sequence[int] = KS, temp: float = 0.07
) -> dict[str, float]:
    """Accuracy of votes weighted by exp(cosine / temp) among the k nearest of the bank, in percent.

    Args:
        bank: features with known labels [m, d]; queries: features to classify [n, d]; both are normalized here.
        ks: numbers of neighbors; those above m are left out.

    Returns:
        {"knn10_top1": ..., "knn10_top5": ..., ...}; top-5 only with five classes or more. It counts a class only if a
        neighbor votes for it.

    Raises:
        ValueError: fewer bank images than the smallest k.
    """
    return search_and_vote(bank, bank_labels, queries, labels, ks, temp)[0]


@torch.no_grad()
def search_and_vote(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, ks: Sequence[int], temp: float
) -> tuple[dict[str, float], Tensor]:
    """What `classify` returns, and the cosine of each query to the nearest of the bank [n]."""
    ks = [k for k in ks if k <= len(bank)] if min(ks) <= len(bank) else []
    if not ks:
        raise ValueError(f"k-NN needs more labeled images than neighbors, but there are only {len(bank)}; lower --k.")
    num_classes = int(max(bank_labels.max(), labels.max())) + 1
    top = min(5, num_classes)
    cosines, rows = find_neighbors(F.normalize(queries.float(), dim=1), F.normalize(bank.float(), dim=1), max(ks))
    voters, result = bank_labels[rows], {}
    for k in ks:
        hits = torch.zeros(2, dtype=torch.float64)  # a person reads 17.6, not 17.600000381
        for part in split_rows(len(queries), num_classes):
            best = vote(cosines[part, :k], voters[part, :k], num_classes, temp).topk(top, dim=1)
            # Where fewer classes than `top` got a vote, the others fill up the best in any order.
            right = (best.indices == labels[part, None]) & (best.values > 0)
            hits += torch.stack([right[:, 0].sum(), right.sum()]).cpu()
        result[f"knn{k}_top1"], top5 = (100 * hits / len(queries)).tolist()
        if top == 5:
            result[f"knn{k}_top5"] = top5
    return result, cosines[:, 0]


def evaluate(model: Backbone, options: KnnOptions, device: torch.device) -> Result:
    """`classify` on features of the evaluation view, exact, in float32."""
    train, test = open_labeled_pair(options.data, options.val)
    size = options.size or model.view_size
    bank = cache.load_labeled(model, train, size, "training")
    queries = cache.load_labeled(model, test, size, "test")
    known, asked = ((part.values.to(device), part.labels.to(device)) for part in (bank, queries))
    figures, nearest = search_and_vote(*known, *asked, options.k, options.temp)
    floors = find_floors(train, test, min(size, LARGEST), options.k, options.temp)
    notes = [floors.describe()]
    if 20 * (twice := int((nearest > 1 - SAME).sum())) > len(nearest):
        notes.append(
            f"Warning: {twice:,} of {len(nearest):,} test images are among the training images too, so the figures say "
            "little; give others with --val."
        )
    what = "[CLS]" if model.has_attention else "pooled"
    return Result(
        figures,
        f"k-NN of {what} features at {size} pixels, votes weighted by exp(cosine / {options.temp:g})",
        {"bank": train.fingerprint, "queries": test.fingerprint},
        {"images in the bank": len(bank.values), "classified": len(queries.values)},
        notes=tuple(notes),
        floors={figure: floors.found for figure in figures if figure.endswith("top1")},
    )


class Floors(NamedTuple):
    found: dict[str, float]  # accuracies by their names, percent
    images: str  # in words
    margin: float  # points that two accuracies near 50 % may differ by chance

    def describe(self, of: str = "") -> str:
        """A line below the figures. `of`: which of them, where others have other floors."""
        found = ", ".join(f"{name} {x:.1f} %" for name, x in self.found.items())
        return f"To beat{of}, on {self.images}: {found}; a difference of up to {self.margin:.1f} points may be chance"


_found: dict[tuple[object, ...], Floors] = {}  # of what this process has evaluated: a training does it again and again


def find_floors(train: Source, test: Source, edge: int, ks: Sequence[int] = (20, 10, 1), temp: float = 0.07) -> Floors:
    """Votes as in `classify` on raw pixels of `edge` pixels and on color histograms, by the one of `ks` next to 20, and the
    share of the largest class.
    """
    k = min((k for k in ks if k <= min(len(train), BANK)), key=lambda k: abs(k - 20), default=0)
    key = (train.fingerprint, test.fingerprint, edge, k, temp)
    if key not in _found:
        _found[key] = measure_floors(train, test, edge, k, temp)
    return _found[key]


def measure_floors(train: Source, test: Source, edge: int, k: int, temp: float) -> Floors:
    views, labels = [], []
    for source, most in ((train, BANK), (test, QUERIES)):
        known = np.flatnonzero(required(source.labels) >= 0)
        views.append(read_views(source, known[list(evenly_spaced(len(known), most))], edge, "floors"))
        labels.append(torch.from_numpy(required(source.labels)[views[-1].indices]))
    floors = {"the largest class": 100 * float(labels[1].bincount().max()) / len(labels[1])}
    if 0 < k <= len(labels[0]):
        for name, describe in describe_plainly(edge).items():
            bank, queries = (describe(part).values for part in views)
            accuracy = classify(bank, labels[0], queries, labels[1], (k,), temp)[f"knn{k}_top1"]
            floors[f"{k}-NN of {name}"] = accuracy
    images = f"{len(labels[1]):,} test images and {len(labels[0]):,} of the bank"
    return Floors(floors, images, measure_margin(50, 50, len(labels[1])))
