"""Weighted k-nearest-neighbor classification on frozen features (paper section 4.1 and appendix F.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dino.data.open import open_labeled_pair
from dino.eval.evaluate import Result
from dino.features import cache
from dino.features.neighbors import find_neighbors, split_rows, vote
from dino.models import Backbone
from dino.options.evaluate import KnnOptions

KS = (10, 20, 100, 200)


@torch.no_grad()
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
    ks = [k for k in ks if k <= len(bank)] if min(ks) <= len(bank) else []
    if not ks:
        raise ValueError(f"k-NN needs more labeled images than neighbors, but there are only {len(bank)}; lower --k.")
    num_classes = int(max(bank_labels.max(), labels.max())) + 1
    top = min(5, num_classes)
    cosines, rows = find_neighbors(F.normalize(queries.float(), dim=1), F.normalize(bank.float(), dim=1), max(ks))
    voters, result = bank_labels[rows], {}
    for k in ks:
        hits = torch.zeros(2)
        for part in split_rows(len(queries), num_classes):
            best = vote(cosines[part, :k], voters[part, :k], num_classes, temp).topk(top, dim=1)
            # Where fewer classes than `top` got a vote, the others fill up the best in any order.
            right = (best.indices == labels[part, None]) & (best.values > 0)
            hits += torch.stack([right[:, 0].sum(), right.sum()]).cpu()
        result[f"knn{k}_top1"], top5 = (100 * hits / len(queries)).tolist()
        if top == 5:
            result[f"knn{k}_top5"] = top5
    return result


def evaluate(model: Backbone, options: KnnOptions, device: torch.device) -> Result:
    """`classify` on [CLS] features of the evaluation view, exact, in float32."""
    train, test = open_labeled_pair(options.data, options.val)
    size = options.size or model.view_size
    bank, queries = (
        cache.load_labeled(model, source, size, what) for source, what in ((train, "training"), (test, "test"))
    )
    known, asked = ((part.values.to(device), part.labels.to(device)) for part in (bank, queries))
    figures = classify(*known, *asked, options.k, options.temp)
    return Result(
        figures,
        f"k-NN of [CLS] features at {size} pixels, votes weighted by exp(cosine / {options.temp:g})",
        {"bank": train.fingerprint, "queries": test.fingerprint},
        {"images in the bank": len(bank.values), "classified": len(queries.values)},
    )
