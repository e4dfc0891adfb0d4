"""Features in two dimensions: images with similar features lie near each other."""

from __future__ import annotations

import colorsys

import numpy as np
import torch
from torch import Tensor

from dino import errors, files
from dino.data.sources import evenly_spaced
from dino.features.embedding import Embedding
from dino.features.neighbors import find_neighbors

MOST, AXES, NEAREST = 10_000, 50, 5  # rows that t-SNE places; main axes that it sees; neighbors that place the others


def lay_out(values: Tensor, what: str = "images") -> np.ndarray:
    """Points [n, 2] for features [n, d] of length 1: PCA to AXES dimensions, then t-SNE (van der Maaten & Hinton 2008).

    Of more than MOST rows, evenly spaced ones are placed so, and each other at the median of its NEAREST among these.

    Raises:
        ValueError: scikit-learn is missing, or there are fewer than three rows.
    """
    decomposition, manifold = (
        errors.import_optional(f"sklearn.{part}", "t-SNE needs scikit-learn", "figures")
        for part in ("decomposition", "manifold")
    )
    if len(values) < 3:
        raise ValueError(f"a map needs at least 3 {what}, but there are {len(values)}.")
    chosen = np.asarray(evenly_spaced(len(values), MOST))
    some = values[torch.from_numpy(chosen)]
    axes = decomposition.PCA(min(AXES, *some.shape), random_state=0).fit_transform(some.numpy())
    tsne = manifold.TSNE(perplexity=min(30.0, (len(some) - 1) / 3), init="pca", random_state=0)
    placed = tsne.fit_transform(axes)
    if len(some) == len(values):
        return placed
    points = np.median(placed[find_neighbors(values, some, NEAREST)[1].numpy()], axis=1)
    points[chosen] = placed
    return points


def lay_out_once(embedding: Embedding) -> np.ndarray:
    """The same of an embedding, kept in the cache."""
    path = files.cache_folder() / "layouts" / f"{embedding.folder.digest[:32]}.npy"
    try:
        points = np.load(path)
        if points.shape == (len(embedding), 2):
            return points
    except (OSError, ValueError):  # there is none, or it is damaged
        pass
    points = lay_out(embedding.values)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, points)
    return points


def pick_colors(count: int) -> list[str]:
    """Colors that differ, such as "#1f77b4"."""
    hues = [(number * 0.381966) % 1 for number in range(count)]  # by the golden ratio: neighbors differ much
    tones = ((0.42, 0.75), (0.58, 0.65), (0.5, 0.95))  # lightness and saturation, in turn
    colors = [colorsys.hls_to_rgb(hue, *tones[i % 3]) for i, hue in enumerate(hues)]
    return ["#" + "".join(f"{round(255 * part):02x}" for part in color) for color in colors]
