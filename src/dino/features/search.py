"""Neighbors and outliers among the features of an embedding, by cosine; and whether its model can tell images apart."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dino import errors, weights
from dino.data.image_files import Images
from dino.data.sources import Source, evenly_spaced
from dino.engine.health import feature_health
from dino.features.embedding import AnyEmbedding, Embedding, Folder, Mapped, Rows, open_whole
from dino.features.extract import extract
from dino.features.ivfpq import FEWEST, Ivfpq, find_exactly
from dino.features.neighbors import find_neighbors
from dino.html import NUM_NEIGHBORS, NeighborRow, read_row, read_square, render
from dino.models import Backbone
from dino.options.commands import OutliersOptions, SearchOptions
from dino.options.rules import checked
from dino.terminal import track
from dino.weights import fingerprint
from dino.weights.pictures import Picture, list_pictures, read_picture

IndexKind = Literal["flat", "ivfpq"]
MANY = 2**20  # rows that are searched exactly and in memory, which takes six bytes for each of their numbers
FEW = 4  # queries; so few are faster one by one
HALF_ERROR = 2e-3  # bound on the error of a cosine in half precision, which rounds three times by 2^-11
READ = 2**12  # rows that are read at a time where all rows are queries
SHOWN = 10  # queries, and neighbors of each, of a result that is printed
JUDGED = 1000  # rows among which typical cosines are measured
# A model cannot tell images apart if half of all pairs have so large a cosine, and their features so few directions; or if
# half have a cosine so near to 1. Photographs and small models that were trained for three epochs: 0.78 to 0.91 and 10 to 18.
MOST_TYPICAL, LEAST_RANK, NO_DIFFERENCE = 0.75, 20, 0.99


def open_rows(embedding: AnyEmbedding) -> Rows:
    """An embedding in memory, or where it has many rows, mapped from the disk."""
    if isinstance(embedding, Embedding | Mapped):
        return embedding
    folder = open_whole(embedding)
    return Mapped(folder) if folder.rows > MANY else folder.read()


def _sample(embedding: Rows) -> Tensor:
    return embedding.take(evenly_spaced(len(embedding), JUDGED))


def measure_typical(embedding: Rows) -> float:
    """The cosine that half of all pairs of rows exceed; 0 where there is no pair."""
    values = _sample(embedding)
    first, second = torch.triu_indices(len(values), len(values), 1)
    return (values @ values.T)[first, second].median().item() if len(first) else 0.0


def judge_features(embedding: Rows) -> str | None:
    """A sentence that says why the model cannot tell these images apart; None: it can."""
    if (typical := measure_typical(embedding)) <= MOST_TYPICAL:
        return None
    rank = feature_health(_sample(embedding))["effective_rank"]
    if rank >= LEAST_RANK and typical <= NO_DIFFERENCE:
        return None
    name = embedding.folder.about.get("model") or "of this embedding"
    return (
        f"The model {name} cannot tell these images apart (half of all pairs have a cosine over {typical:.3f}, and the "
        f"features differ in about {rank:.0f} directions); train it longer, or use a better one."
    )


def choose_index(rows: Rows, kind: IndexKind | None) -> IndexKind:
    """The index that `kind` stands for; an approximate one of few rows is exact."""
    wanted = kind or ("flat" if isinstance(rows, Embedding) else "ivfpq")
    return wanted if len(rows) >= FEWEST else "flat"


class Index:
    """Finds the rows of an embedding nearest to a feature.

    'flat' compares with every row, exactly; 'ivfpq' is approximate (see `Ivfpq`), but for few rows. None: 'flat' for rows in
    memory, 'ivfpq' for those that are not.

    Raises:
        ValueError: no such kind, FAISS is missing, or the index's file is older than the embedding or not of it.
    """

    def __init__(self, embedding: str | Path | Rows, kind: IndexKind | None = None, rebuild: bool = False):
        if kind is not None and kind not in get_args(IndexKind):
            raise errors.unknown("index", kind, get_args(IndexKind))
        self.embedding = open_rows(embedding)
        self.values = self.embedding.values if isinstance(self.embedding, Embedding) else None
        self.rough: Tensor | None = None  # the rows in half precision, made when first needed
        self.approximate = Ivfpq(self.embedding, rebuild) if choose_index(self.embedding, kind) == "ivfpq" else None

    def find_nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Cosines and rows [q, k] of the k rows nearest to each of `queries` [q, d], the nearest first.

        An approximate index may find fewer; row -1 stands for the others.
        """
        queries, k = F.normalize(queries.float(), dim=1), min(k, len(self.embedding))
        if self.approximate is not None:
            return self.approximate.find_nearest(queries, k)
        if self.values is None:
            return find_exactly(self.embedding, queries, k)
        if len(queries) > FEW:
            return find_neighbors(queries, self.values, k)
        cosine, rows = zip(*(self._scan(query, self.values, k) for query in queries), strict=True)
        return torch.cat(cosine), torch.cat(rows)

    def iterate_nearest(self, k: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """`find_nearest` of all rows of the embedding, some at a time: the first of them, cosines and rows."""
        start, steps = 0, -(-len(self.embedding) // READ)
        for queries in track(self.embedding.iterate(READ), steps, "neighbors of each image"):
            yield start, *self.find_nearest(queries, k)
            start += len(queries)

    def _scan(self, query: Tensor, rows_in_memory: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The same for one query [d], exactly. The time goes into reading memory, so rows are first read in half precision.

        A row among the k nearest is at most twice the error below the k-th of the rough cosines.
        """
        self.rough = rows_in_memory.half() if self.rough is None else self.rough
        # NumPy from here on: PyTorch's threads would cost more time than the little work that is left.
        rough = (self.rough @ query.half()).numpy().astype(np.float32)
        rows = np.flatnonzero(rough >= np.partition(rough, -k)[-k] - 2 * HALF_ERROR)
        values = rows_in_memory.numpy()
        cosine = (values @ query.numpy())[rows] if 8 * len(rows) > len(values) else values[rows] @ query.numpy()
        best = np.argsort(-cosine, kind="stable")[:k]
        return torch.from_numpy(cosine[best])[None], torch.from_numpy(rows[best])[None]

    def search(self, model: Backbone, images: Images, k: int) -> Found:
        """The k images most like each of `images`, by the model that made the embedding.

        Raises:
            ValueError: no image can be read.
        """
        about = self.embedding.folder.about
        found = extract(model, images, about["size"], pooling=about["pooling"])
        for name, reason in found.bad:
            print(f"Skipped {name}: {reason}", file=sys.stderr)
        if not len(found.indices):
            raise ValueError(f"none of the {len(images)} query images can be read; give others.")
        cosine, rows = self.find_nearest(found.values, k)
        readable = Images([images.items[i] for i in found.indices])
        return Found(readable, cosine.numpy(), rows.numpy(), self.embedding, self, found.bad)


class Found(NamedTuple):
    queries: Images  # the images asked with, if they could be read
    cosine: np.ndarray  # [q, k]
    rows: np.ndarray  # [q, k] of the embedding
    embedding: Rows
    used: Index
    bad: list[tuple[str, str]]  # name and reason of images that could not be read

    @property
    def paths(self) -> list[list[str]]:
        """The images found for each query, the nearest first."""
        return [[self.embedding.names[row] for _, row in pairs] for pairs in self.pairs]

    @property
    def pairs(self) -> list[list[tuple[float, int]]]:
        """Cosine and row of each image found for each query; an approximate index may find fewer than k."""
        both = zip(self.cosine.tolist(), self.rows.tolist(), strict=True)
        return [[(value, row) for value, row in zip(*pair, strict=True) if row >= 0] for pair in both]

    def read_pictures(self, images: Source, most: int) -> Iterator[NeighborRow]:
        """The first `most` queries with their first neighbors, read from `images`, which are those of the embedding."""
        for i, pairs in enumerate(self.pairs[:most]):
            found = [(value, int(self.embedding.positions[row])) for value, row in pairs[:NUM_NEIGHBORS]]
            yield read_row(read_square(self.queries, i), Path(self.queries.name(i)).name, None, images, found)

    def __repr__(self) -> str:
        lines = [f"The {self.rows.shape[1]} of {len(self.embedding):,} images most like each of {len(self.rows)}:"]
        for i, pairs in enumerate(self.pairs[:SHOWN]):
            lines += [
                self.queries.name(i),
                *(f"  {value:7.4f}  {self.embedding.names[row]}" for value, row in pairs[:SHOWN]),
            ]
        return "\n".join(lines)

    def _repr_html_(self) -> str | None:
        try:
            return render("strips", rows=list(self.read_pictures(self.embedding.folder.images(), SHOWN)))
        except ValueError:  # the images are gone
            return None


@checked(SearchOptions, "embedding", "k", "index", "model", "device", "rebuild")
def search(
    embedding: AnyEmbedding,
    images: Picture | Sequence[Picture],
    k: int = 10,
    index: IndexKind | None = None,
    model: str | os.PathLike[str] | Backbone | None = None,
    device: str = "auto",
    rebuild: bool = False,
) -> Found:
    """The k images of an embedding whose features are most like those of each of `images`, by cosine.

    Args:
        embedding: what `dino.embed` gives, or where it lies.
        images: paths, PIL images or arrays [h, w, 3] uint8; or one of them.
        index: exact ('flat') or approximate ('ivfpq'), see `Index`. None: exact up to a million rows.
        rebuild: make its file anew.
        model: what made the embedding. None: what the embedding names.

    Raises:
        ValueError: the model is another than the embedding's, or no image can be read.
    """
    embedding = open_rows(embedding)
    wanted = embedding.folder.about["model"] if model is None else model
    if wanted == "":
        raise ValueError(f"{embedding.folder.path} does not say where its model lies; give it with --model.")
    asked = weights.take(wanted, device)
    check_same_model(embedding.folder, asked)
    given = [read_picture(each) if isinstance(each, Image.Image) else each for each in list_pictures(images)]
    return Index(embedding, index, rebuild).search(asked, Images(given), k)


def check_same_model(folder: Folder, model: Backbone) -> None:
    """Refuse a model that did not make the embedding in `folder`."""
    if (own := fingerprint(model)) != (made := folder.about["model_sha256"]) or folder.dim % model.embed_dim:
        raise ValueError(
            f"{folder.path} was made by another model ({folder.about['model'] or 'unnamed'}, {made[:12]}) than the one "
            f"asked with ({own[:12]}); give its own (dino search: with --model), or embed anew."
        )


@checked(OutliersOptions, "embedding", "k", "index", "rebuild")
def outliers(embedding: AnyEmbedding, k: int = 10, index: IndexKind | None = None, rebuild: bool = False) -> Tensor:
    """Mean cosine of each row and its k nearest others [n]. It is low for an image unlike all others.

    Args:
        embedding: what `dino.embed` gives, or where it lies.
        index, rebuild: see `dino.search`.
    """
    embedding = open_rows(embedding)
    if len(embedding) < 2:
        raise ValueError(f"{embedding.folder.path} holds one image only; an outlier needs others to differ from.")
    if not 1 <= k < len(embedding):
        raise ValueError(f"k is {k}; it must be from 1 to {len(embedding) - 1}, the number of other images.")
    scores = []
    for start, cosine, rows in Index(embedding, index, rebuild).iterate_nearest(k + 1):
        itself = rows == torch.arange(start, start + len(rows))[:, None]
        # Where a copy came first or the index missed the row itself, the last row is one too many.
        itself[~itself.any(dim=1), -1] = True
        scores.append(cosine[~itself].view(-1, k).mean(dim=1))
    return torch.cat(scores)
