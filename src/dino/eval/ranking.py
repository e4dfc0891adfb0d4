"""What retrieval and copy detection share: average precision, whitening, and features to compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino.data.evaluation_views import Resize
from dino.data.image_files import open_source
from dino.data.sources import Source
from dino.features import cache
from dino.features.extract import Pooling, report_unreadable
from dino.models import Backbone
from dino.options.evaluate import RankingOptions

Indices = Sequence[int] | np.ndarray


def average_precision(positions: np.ndarray, total: int) -> float:
    """Area under the precision-recall curve by trapezoids, from 0 to 1.

    Args:
        positions: ranks of the relevant images that were found, ascending, counted from 0.
        total: number of all relevant images.
    """
    found = np.arange(len(positions))
    before = np.where(positions > 0, found / np.maximum(positions, 1), 1.0)  # precision just before each hit
    after = (found + 1) / (positions + 1)
    return float((before + after).sum() / 2 / total)


def find_precisions(
    rankings: np.ndarray, relevant: Sequence[Indices], junk: Sequence[Indices], ks: Sequence[int]
) -> np.ndarray:
    """Average precision, and precision at each of `ks`, from 0 to 1, of each query that has a relevant image [q', 1 + ks].

    Precision at k counts only the ranks down to the last relevant image if that is above k, as the benchmark does.

    Args:
        rankings: database indices for each query, the best first [q, m].
        relevant, junk: database indices to find and to ignore for each query. A query with nothing to find is left out.
        ks: depths of the precisions.
    """
    rows = [np.empty((0, 1 + len(ks)))]
    for ranking, wanted, ignored in zip(rankings, relevant, junk, strict=True):
        if not len(wanted):
            continue
        positions = np.flatnonzero(np.isin(ranking, wanted))
        positions -= np.searchsorted(np.flatnonzero(np.isin(ranking, ignored)), positions)
        depths = [min(k, positions[-1] + 1) for k in ks]
        at = [(positions < depth).sum() / depth for depth in depths]
        rows.append(np.array([[average_precision(positions, len(wanted)), *at]]))
    return np.concatenate(rows)


def average_queries(rows: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """Means of what `find_precisions` found, percent: {"map": ..., "mp1": ..., ...}; {} if no query had anything to find."""
    names = ["map", *(f"mp{k}" for k in ks)]
    return dict(zip(names, (100 * rows.mean(axis=0)).tolist(), strict=True)) if len(rows) else {}


class Whitening(NamedTuple):
    """PCA that gives all directions the same variance: features [n, d] become (features - mean) @ projection."""

    mean: Tensor  # [d] float64
    projection: Tensor  # [d, d] float64, largest variance first

    def __call__(self, features: Tensor) -> Tensor:
        return ((features.double() - self.mean) @ self.projection).float()


def learn_whitening(features: Tensor, centered: bool) -> Whitening:
    """The whitening of features [n, d].

    Args:
        centered: use the covariance of the centered features. The reference centers features only to project them.
    """
    features = features.double()
    mean = features.mean(dim=0)
    around = features - mean if centered else features
    variances, directions = torch.linalg.eigh(around.T @ around / len(features))
    variances, directions = variances.flip(0), directions.flip(1)
    return Whitening(mean, directions / variances.clamp(min=1e-5 * variances[0]).sqrt())


class Comparable(NamedTuple):
    """What `extract_comparable` found."""

    features: dict[str, Tensor]  # of each source, of length 1, on the device
    indices: dict[str, np.ndarray]  # positions in the source
    whitened: str  # words for the protocol
    data: dict[str, str]  # fingerprints of the sources


def extract_comparable(
    model: Backbone,
    options: RankingOptions,
    device: torch.device,
    size: int,
    pooling: Pooling,
    resize: Resize,
    sources: dict[str, Source],
    every: bool = True,
) -> Comparable:
    """Features of length 1 of each source, whitened if the options say so.

    Args:
        every: refuse images that cannot be read. False: leave them out, and say so.

    Raises:
        ValueError: an image cannot be read, or there are too few to learn a whitening from.
    """
    if options.whiten is not None:
        sources = sources | {"whitening": open_source(options.whiten, "none")}
    words, features, indices = "", {}, {}
    for part, source in sources.items():
        found = cache.load_or_extract(model, source, size, pooling, part, resize)
        if found.bad and (every or not len(found.values)):  # the figures would mean something else without it
            raise ValueError(
                f"{len(found.bad)} of the {len(source)} images ({part}) cannot be read, first {found.bad[0][0]} "
                f"({found.bad[0][1]}); replace or remove them, every image counts."
            )
        report_unreadable(found.bad, part)
        features[part], indices[part] = found.values, found.indices
    if options.whiten is not None:
        learned = features.pop("whitening")
        if len(learned) < 2:
            raise ValueError(
                f"--whiten {options.whiten} holds one image; give as many as the features are wide, or more."
            )
        whitening = learn_whitening(learned, centered=options.protocol == "fixed")
        features = {part: whitening(values) for part, values in features.items()}
        words = f", whitened by a PCA of {len(learned):,} other images"
    unit = {part: F.normalize(values, dim=1).to(device) for part, values in features.items()}
    return Comparable(unit, indices, words, {part: source.fingerprint for part, source in sources.items()})
