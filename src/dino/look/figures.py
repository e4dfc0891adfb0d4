"""Figures for a model and labeled images: the paper's map of classes, and pages of right and wrong neighbors."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from dino import distributed, errors, files, weights
from dino.data.open import open_labeled_pair, open_labeled_test
from dino.data.sources import Source, evenly_spaced
from dino.features import cache
from dino.features.neighbors import find_neighbors, vote
from dino.html import NUM_NEIGHBORS, get_label, read_row, read_square, render, write_page
from dino.options.commands import NeighborsOptions, TsneOptions


def extract_labeled(options: TsneOptions, **sources: Source) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
    """[CLS] features [m, d] of length 1, labels [m] and positions [m] of the readable images of each source."""
    model = weights.load(options.model).to(distributed.start(options.device))
    for what, source in sources.items():
        found = cache.load_labeled(model, source, options.size or model.view_size, what)
        yield F.normalize(found.values, dim=1), found.labels, found.indices


def map_classes(features: Tensor, labels: Tensor, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Each class's mean feature in two dimensions, by t-SNE (paper Fig. 11).

    Args:
        features: [n, d]; labels: [n].

    Returns:
        Classes that have an image [c], and their points [c, 2].

    Raises:
        ValueError: scikit-learn is missing, or there are fewer than three classes.
    """
    manifold = errors.import_optional("sklearn.manifold", "t-SNE needs scikit-learn", "figures")
    sums = torch.zeros(num_classes, features.shape[1]).index_add_(0, labels, features)
    present = torch.unique(labels)
    if len(present) < 3:
        raise ValueError(f"a map of classes needs at least 3 of them, but there are {len(present)}.")
    means = F.normalize(sums[present], dim=1).numpy()
    perplexity = min(30.0, (len(present) - 1) / 3)
    return present.numpy(), manifold.TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(means)


def draw_tsne(options: TsneOptions) -> None:
    """Write the map of classes; classes that lie close together have similar features."""
    out = files.check_writable(options.out, ".png .svg .pdf")
    source = open_labeled_test(options.data)
    ((features, labels, _),) = extract_labeled(options, labeled=source)
    classes, points = map_classes(features, labels, len(source.classes))
    edge = 5 + 0.6 * len(classes) ** 0.5  # inches
    figure = Figure((edge, edge), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.scatter(*points.T, s=8)
    for name, (x, y) in zip((source.classes[c] for c in classes), points, strict=True):
        axes.annotate(name, (x, y), (3, 3), textcoords="offset points", fontsize=7)
    with files.replacing(out) as temporary:
        figure.savefig(temporary, format=out.suffix[1:], dpi=150, bbox_inches="tight")
    print(f"{out}: {len(classes)} classes, the means of {len(labels)} images")


def draw_neighbor_page(options: NeighborsOptions) -> None:
    """Write a page of queries that k-NN gets right, and of those that it gets wrong, with their neighbors."""
    out = files.check_writable(options.out, ".html")
    train, test = open_labeled_pair(options.data, options.val)
    (bank, labels, places), (queries, wanted, positions) = extract_labeled(options, training=train, test=test)
    k = min(options.k, len(bank))
    cosines, nearest = find_neighbors(queries, bank, k)
    right = vote(cosines, labels[nearest], len(train.classes)).argmax(dim=1) == wanted
    score = f"{100 * right.float().mean():.1f} % of {len(right)} queries"
    sections = {}
    for title, chosen in (("Right", right), ("Wrong", ~right)):
        all_such = torch.nonzero(chosen)[:, 0].tolist()
        rows = []
        for i in (all_such[j] for j in evenly_spaced(len(all_such), options.rows)):
            query, label = read_square(test, at := int(positions[i])), get_label(test, at)
            alike = [*zip(cosines[i].tolist(), places[nearest[i].numpy()].tolist(), strict=True)][:NUM_NEIGHBORS]
            rows.append(read_row(query, label or "", label, train, alike))
        sections[f"{title}: {len(all_such)} of {len(right)}"] = render("rows", rows=rows)
    top = (
        f"The {k} nearest of {len(bank):,} labeled images vote for the class of each query (on the left), weighted by "
        f"exp(cosine / 0.07), and {score} get the right one. Shown are evenly spaced queries and their nearest images; a "
        "tick marks those of the query's class."
    )
    write_page(out, options.model, "Nearest neighbors", render("text", text=top), sections)
    print(f"{out}: {score} right")
