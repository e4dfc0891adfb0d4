"""Figures for a model and labeled images: the paper's map of classes, and pages of right and wrong neighbors."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from torch import Tensor

from dino import files, weights
from dino.data.open import open_labeled_pair, open_labeled_test
from dino.data.sources import Source, evenly_spaced
from dino.features import cache
from dino.features.layout import lay_out, pick_colors
from dino.features.neighbors import find_neighbors, vote
from dino.html import NUM_NEIGHBORS, get_label, read_row, read_square, render, write_page
from dino.options.commands import NeighborsOptions, TsneOptions

MOST_IMAGES, THUMBNAIL = 600, 48  # images that a map shows themselves; their pixels


def extract_labeled(
    options: TsneOptions | NeighborsOptions, **sources: Source
) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
    """[CLS] features [m, d] of length 1, labels [m] and positions [m] of the readable images of each source."""
    model = weights.take(options.model, options.device)
    for what, source in sources.items():
        found = cache.load_labeled(model, source, options.size or model.view_size, what)
        yield F.normalize(found.values, dim=1), found.labels, found.indices


def average_classes(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Each class's mean feature.

    Args:
        features: [n, d]; labels: [n].

    Returns:
        Means [c, d] of length 1, and the classes that have an image [c].
    """
    sums = torch.zeros(num_classes, features.shape[1]).index_add_(0, labels, features)
    present = torch.unique(labels)
    return F.normalize(sums[present], dim=1), present


def draw_tsne(options: TsneOptions) -> None:
    """Write a map of labeled images or of their classes; what lies close together has similar features."""
    out = files.check_writable(options.out, ".png .svg .pdf")
    source = open_labeled_test(options.data)
    ((features, labels, positions),) = extract_labeled(options, labeled=source)
    number, said = len(labels), f"{len(labels):,} images of {len(torch.unique(labels))} classes"
    if options.show == "means":
        features, labels = average_classes(features, labels, len(source.classes))
        said = f"{len(labels)} classes, the means of {number:,} images"
    elif options.show == "images" and number > MOST_IMAGES:
        chosen = torch.tensor(evenly_spaced(number, MOST_IMAGES))
        features, labels, positions = features[chosen], labels[chosen], positions[chosen.numpy()]
        said = f"{MOST_IMAGES} of {said}"
    points = lay_out(features, "classes" if options.show == "means" else "images")
    edge = 5 + 0.6 * len(labels) ** 0.5 if options.show == "means" else 10  # inches
    figure = Figure((edge, edge), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axis_off()
    if options.show == "means":
        axes.scatter(*points.T, s=8)
        for label, (x, y) in zip(labels.tolist(), points, strict=True):
            axes.annotate(source.classes[label], (x, y), (3, 3), textcoords="offset points", fontsize=7)
    else:
        present = torch.unique(labels).tolist()
        for label, color in zip(present, pick_colors(len(present)), strict=True):
            own = np.flatnonzero(labels.numpy() == label)
            axes.scatter(*points[own].T, s=12, color=color, label=source.classes[label], linewidths=0)
            if options.show == "images":
                for row in own:
                    thumbnail = OffsetImage(read_square(source, int(positions[row]), THUMBNAIL), zoom=0.45)
                    frame = {"edgecolor": color, "linewidth": 1.5}
                    axes.add_artist(AnnotationBbox(thumbnail, tuple(points[row]), pad=0, bboxprops=frame))
        # Beside the map, in as many columns as it is high; `savefig` makes the figure as wide as it needs.
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), ncols=-(-len(present) // 45), frameon=False, fontsize=9)
    with files.replacing(out) as temporary:
        figure.savefig(temporary, format=out.suffix[1:], dpi=150, bbox_inches="tight")
    print(f"{out}: {said}")


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
