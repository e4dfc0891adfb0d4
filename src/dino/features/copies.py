"""Near-copies: features say which images may be copies of each other, and their pixels decide.

Two images are copies if one, moved and scaled a little so that it lies on the other, has the same colors everywhere. So a
picture that was resized, compressed again, cropped at its border, or made brighter is found. A mirror image, another crop
and a picture in which something was added are not. docs/experiments.md has the figures behind the limits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from dino.data.decode import BadImage
from dino.data.sources import Source
from dino.features.embedding import AnyEmbedding, Rows
from dino.features.neighbors import split_rows
from dino.features.search import Index, IndexKind, judge_features, measure_typical, open_rows
from dino.options.commands import DuplicatesOptions
from dino.options.rules import checked
from dino.terminal import track

CANDIDATE_RATIO = 0.1  # two rows may be copies below this fraction of the distance (1 - cosine) of a typical pair
ALONE_RATIO = 0.01  # the same where no pixels decide
MIN_DISTANCE = 1e-6  # shorter distances are rounding errors
EDGE, SKETCH = 64, 8  # pixels of a thumbnail, and of its thumbnail
LEAST_SKETCH = 0.85  # correlation of two sketches below which thumbnails are not compared
LEAST_CORRELATION, MOST_DIFFERENCE = 0.93, 20  # of thumbnails; gray levels, in the mean of any 8 x 8 pixels
MOST_STRETCH, MOST_BRIGHTER = 0.15, 40  # of a side; gray levels
_STEPS = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 40, 1e-3)


class View(NamedTuple):
    """What is compared of an image, and what says which of its copies is the best."""

    thumbnail: np.ndarray  # [EDGE, EDGE, 3] uint8
    width: int
    height: int
    bytes: int | None  # of its file; None: it has no file


class Copy(NamedTuple):
    row: int
    cosine: float  # to the first of its group
    view: View | None  # None: pixels were not compared


@dataclass(frozen=True)
class Copies:
    """Groups of near-copies, the largest first. The first of each group is the best to keep; the others are its copies."""

    groups: list[list[Copy]]
    least: float  # cosine from which rows were candidates; -1: all were
    confirmed: bool  # by pixels
    notes: list[str]  # what whoever reads them must know


@checked(DuplicatesOptions, "embedding", "threshold", "index", "rebuild")
def duplicates(
    embedding: AnyEmbedding,
    threshold: float | None = None,
    index: IndexKind | None = None,
    rebuild: bool = False,
    confirm: bool = True,
) -> list[list[int]]:
    """Rows of near-copies in groups, the largest first; the first row of a group is the best to keep.

    Args:
        threshold, index, rebuild: see `find_copies`.
        confirm: compare pixels. False: by features alone, which a small model gets wrong.

    Raises:
        ValueError: the images are gone, so that pixels cannot be compared.
    """
    embedding = open_rows(embedding)
    images = embedding.folder.images() if confirm else None
    found = find_copies(embedding, images, threshold, index, rebuild)
    return [[copy.row for copy in group] for group in found.groups]


def find_copies(
    embedding: Rows,
    images: Source | None,
    threshold: float | None = None,
    index: IndexKind | None = None,
    rebuild: bool = False,
) -> Copies:
    """Groups of rows that may be near-copies by their features, and are by the pixels of `images`.

    Each copy is compared with the image to keep, so a chain of small changes makes no group.

    Args:
        images: what the embedding was made of. None: features alone decide.
        threshold: cosine from which two rows may be copies. None: their distance is at most CANDIDATE_RATIO (without
            images, ALONE_RATIO) of that of a typical pair; and if the model cannot tell the images apart, all may be.
        index: 'flat' (None) compares all pairs of rows; an approximate index finds most of them, sooner.

    Raises:
        ValueError: the model cannot tell the images apart and nothing else can.
    """
    used, notes, count = Index(embedding, index, rebuild), [], len(embedding)
    ratio = ALONE_RATIO if images is None else CANDIDATE_RATIO
    least = choose_threshold(embedding, ratio) if threshold is None else threshold
    fault = judge_features(embedding) if threshold is None else None
    if fault and images is None:
        raise ValueError(f"near-copies cannot be found without the pixels of the images: {fault}")
    if fault:
        notes.append(f"{fault} So the pixels of all images are compared.")
        least, rooms = -1.0, [torch.arange(count)]
    else:
        rooms = _connect(used, least)
    if images is None:
        groups = [room.tolist() for room in rooms]
        views: dict[int, View] = {}
    else:
        views = _read_views(embedding, images, torch.cat(rooms).tolist() if rooms else [])
        groups = [
            group for room in rooms for group in _group([i for i in room.tolist() if i in views], views, embedding)
        ]
        if lost := sum(map(len, rooms)) - len(views):
            notes.append(f"{lost} images can no longer be read and are left out.")
    copies = []
    for group in sorted(groups, key=len, reverse=True):
        values = embedding.take(group)
        cosine = (values @ values[0]).tolist()
        copies.append([Copy(row, value, views.get(row)) for row, value in zip(group, cosine, strict=True)])
    return Copies(copies, least, images is not None, notes)


def choose_threshold(embedding: Rows, ratio: float) -> float:
    """The cosine of a pair whose distance is `ratio` of that of a typical pair."""
    return min(1 - ratio * (1 - measure_typical(embedding)), 1 - MIN_DISTANCE)


def _connect(used: Index, least: float) -> list[Tensor]:
    """Sets of rows that are joined by pairs whose cosine is `least` or more, without those of one row."""
    alike = torch.zeros(len(used.embedding), dtype=torch.bool)
    for start, cosine, rows in used.iterate_nearest(2):
        at, column = torch.nonzero((cosine >= least) & (rows >= 0), as_tuple=True)
        other = rows[at, column] != at + start
        alike[(at + start)[other]] = alike[rows[at, column][other]] = True
    chosen = torch.nonzero(alike)[:, 0]
    values, count = used.embedding.take(chosen.numpy()), len(chosen)
    names = torch.arange(count, dtype=torch.int32)  # of the set that a row is in: its least row so far
    while True:
        near = (values[part] @ values.T >= least for part in split_rows(count, 2 * count))
        joined = [torch.where(each, names, count).amin(dim=1) for each in near]
        new = torch.minimum(names, torch.cat(joined)) if joined else names
        new = new[new.long()]
        if torch.equal(new, names):
            break
        names = new
    order = names.argsort(stable=True)
    sizes = torch.unique_consecutive(names[order], return_counts=True)[1]
    return [room for room in chosen[order].split(sizes.tolist()) if len(room) > 1]


# --- pixels ----------------------------------------------------------------------------------------------------------


def _read_views(embedding: Rows, images: Source, rows: Sequence[int]) -> dict[int, View]:
    """Of each row whose image can be read."""

    def read(row: int) -> View | None:
        position = int(embedding.positions[row])
        try:
            pixels = images.read(position)
        except BadImage:
            return None
        height, width = pixels.shape[:2]
        thumbnail, root = cv2.resize(pixels, (EDGE, EDGE), interpolation=cv2.INTER_AREA), getattr(images, "root", None)
        size = None if root is None else os.stat(os.path.join(root, images.name(position))).st_size
        return View(thumbnail, width, height, size)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        read_all = [*track(pool.map(read, rows), len(rows), "pixels")]
    return {row: view for row, view in zip(rows, read_all, strict=True) if view is not None}


def _group(rows: list[int], views: dict[int, View], embedding: Rows) -> list[list[int]]:
    """Of `rows` those whose pixels are copies of a better one, in groups after that one."""

    def worth(row: int) -> tuple[int, int, int, str]:
        view, name = views[row], embedding.names[row]
        return -view.width * view.height, -(view.bytes or 0), len(name), name

    rows = sorted(rows, key=worth)
    sketches = torch.from_numpy(np.stack([make_sketch(views[row].thumbnail) for row in rows]))
    free, groups = torch.ones(len(rows), dtype=torch.bool), []
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for part in split_rows(len(rows), len(rows)):
            alike = sketches[part] @ sketches.T >= LEAST_SKETCH
            for i in torch.nonzero(alike.sum(dim=1) > 1)[:, 0].tolist():
                if not free[part.start + i]:
                    continue
                free[part.start + i] = False
                near, first = torch.nonzero(alike[i] & free)[:, 0].tolist(), views[rows[part.start + i]].thumbnail
                same = pool.map(lambda j, first=first: is_copy(first, views[rows[j]].thumbnail), near)
                members = [j for j, found in zip(near, same, strict=True) if found]
                free[members] = False
                groups += [[rows[part.start + i], *(rows[j] for j in members)]] if members else []
    return groups


def make_sketch(thumbnail: np.ndarray) -> np.ndarray:
    """A vector of length 1; the product of two is their correlation, and nearly 1 where both have one color."""
    small = cv2.resize(thumbnail, (SKETCH, SKETCH), interpolation=cv2.INTER_AREA).astype(np.float32).ravel()
    vector = np.append(small - small.mean(), 4)
    return vector / np.linalg.norm(vector)


def is_copy(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether thumbnails [EDGE, EDGE, 3] uint8 show the same picture, up to its border, its brightness and its contrast."""
    gray, warp = [cv2.cvtColor(x, cv2.COLOR_RGB2GRAY) for x in (a, b)], np.eye(2, 3, dtype=np.float32)
    everywhere = np.full((EDGE, EDGE), 255, np.uint8)
    try:  # where b's pixels lie in a (Evangelidis & Psarakis 2008)
        warp = cv2.findTransformECC(gray[0], gray[1], warp, cv2.MOTION_AFFINE, _STEPS, everywhere, 5)[1]
    except cv2.error:  # one color, or nothing in common
        warp = np.eye(2, 3, dtype=np.float32)
    if np.abs(warp[:, :2] - np.eye(2)).max() > MOST_STRETCH:
        return False
    flags, size = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, (EDGE, EDGE)
    common = cv2.warpAffine(everywhere, warp, size, flags=flags) == 255
    if common.mean() < (1 - MOST_STRETCH) ** 2:
        return False
    x, y = a.astype(np.float32), cv2.warpAffine(b, warp, size, flags=flags).astype(np.float32)
    offset = x[common].mean(), y[common].mean()
    x, y = x - offset[0], y - offset[1]
    # One level of noise more, so that pictures of one color are alike.
    squares, spread, other = (1 + float((p * q)[common].mean()) for p, q in ((x, y), (x, x), (y, y)))
    difference = np.where(common[..., None], x - squares / other * y, 0)
    return (
        squares >= LEAST_CORRELATION * (spread * other) ** 0.5
        and float(np.abs(cv2.blur(difference, (8, 8))).max()) <= MOST_DIFFERENCE
        and abs(float(offset[0] - offset[1])) <= MOST_BRIGHTER
    )
