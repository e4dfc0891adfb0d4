"""Weighted k-nearest-neighbor classification on frozen features (paper section 4.1 and appendix F.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dino.data.open import open_labeled_pair
from dino.eval.evaluate import Result
from dino.features import cache
from dino.features.extract import readable_labels
from dino.features.neighbors import largest, vote
from dino.models import Backbone
from dino.options.evaluate import KnnOptions
from dino.weights import fingerprint

KS = (10, 20, 100, 200)
SIMILARITIES_AT_ONCE = 2**26  # 256 MB of float32


@torch.no_grad()
def classify(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, ks: Sequence[int] = KS, temp: float = 0.07
) -> dict[str, float]:
    """Accuracy of votes weighted by exp(cosine / temp) among the k nearest of the bank, in percent.

    Args:
        bank: features with known labels [m, d]; queries: features to classify [n, d]; both are normalized here.
        ks: numbers of neighbors; those above m are left out.

    Returns:
        {"knn10_top1": ..., "knn10_top5": ..., ...}; top-5 only with five classes or more.

    Raises:
        ValueError: fewer bank images than the smallest k.
    """
    ks = [k for k in ks if k <= len(bank)] if min(ks) <= len(bank) else []
    if not ks:
        raise ValueError(f"k-NN needs more labeled images than neighbors, but there are only {len(bank)}; lower --k.")
    num_classes = int(max(bank_labels.max(), labels.max())) + 1
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    top = min(5, num_classes)
    hits = torch.zeros(len(ks), 2)
    chunk = min(max(1, SIMILARITIES_AT_ONCE // len(bank)), len(queries))
    all_of_them = bank.new_empty(
        chunk, len(bank)
    )  # the same memory for every chunk: fresh pages cost as much as a search
    for start in range(0, len(queries), chunk):
        stop = min(start + chunk, len(queries))
        similarity, nearest = largest(torch.mm(queries[start:stop], bank.T, out=all_of_them[: stop - start]), max(ks))
        voters = bank_labels[nearest]
        for row, k in enumerate(ks):
            right = (
                vote(similarity[:, :k], voters[:, :k], num_classes, temp).topk(top, dim=1).indices
                == labels[start:stop, None]
            )
            hits[row] += torch.stack([right[:, 0].sum(), right.sum()]).cpu()
    share = (100 * hits / len(queries)).tolist()
    result = {}
    for k, (top1, top5) in zip(ks, share, strict=True):
        result[f"knn{k}_top1"] = top1
        if top == 5:
            result[f"knn{k}_top5"] = top5
    return result


def evaluate(model: Backbone, options: KnnOptions, device: torch.device) -> Result:
    """`classify` on [CLS] features of the evaluation view, exact, in float32."""
    train, test = open_labeled_pair(options.data, options.val)
    size, digest = options.size or model.image_size, fingerprint(model)
    bank = cache.load_or_extract(model, digest, train, size, device, progress="bank")
    queries = cache.load_or_extract(model, digest, test, size, device, progress="queries")
    figures = classify(
        bank.values.to(device),
        readable_labels(train, bank, "training").to(device),
        queries.values.to(device),
        readable_labels(test, queries, "test").to(device),
        options.k,
        options.temp,
    )
    return Result(
        figures,
        f"k-NN of [CLS] features at {size} pixels, votes weighted by exp(cosine / {options.temp:g})",
        {"bank": train.fingerprint, "queries": test.fingerprint},
        {"images in the bank": len(bank.values), "classified": len(queries.values)},
    )
