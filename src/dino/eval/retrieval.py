"""Retrieval: on revisited Oxford and Paris (paper table 3), and of the images of a class in class folders.

The benchmark of landmarks is of Radenović et al. 2018. Each query has easy and hard images to find, and images that do not
count ("junk"); the protocols Easy, Medium and Hard differ in which of them are to be found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino.data.decode import BadImage
from dino.data.evaluation_views import Resize, shrink
from dino.data.image_files import open_listed
from dino.data.open import open_labeled
from dino.data.sources import Source, Subset, evenly_spaced
from dino.eval.evaluate import Result
from dino.eval.floors import BANK, LARGEST, QUERIES, describe_plainly, read_views
from dino.eval.ranking import average_queries, extract_comparable, find_precisions
from dino.features.extract import Features, Pooling
from dino.features.neighbors import MOST_NUMBERS, split_rows
from dino.models import Backbone
from dino.options import required
from dino.options.evaluate import RetrievalOptions
from dino.terminal import track
from dino.weights import pickles

# --- ground truth ---------------------------------------------------------------------------------------------------

LAYOUT = "expected are DATA/gnd_roxford5k.pkl (or another gnd_NAME.pkl or gnd_NAME.json) and DATA/jpg/NAME.jpg"
SUFFIXES = (".pkl", ".json")


class GroundTruth(NamedTuple):
    path: str
    name: str  # "roxford5k"
    folder: Path  # of the images
    database: list[str]  # file names
    queries: list[str]
    boxes: list[tuple[float, ...]]  # left, top, right, bottom of the landmark in each query image, pixels
    easy: list[list[int]]  # positions in the database for each query
    hard: list[list[int]]
    junk: list[list[int]]


def find_ground_truth(data: str) -> Path | None:
    """The file of the ground truth in a folder, or that `data` names; None: there is none.

    Raises:
        ValueError: there are several.
    """
    path = Path(data).expanduser()
    if not path.is_dir():
        return path if path.suffix in SUFFIXES else None
    found = sorted(file for file in path.glob("gnd_*") if file.suffix in SUFFIXES)
    if len(found) > 1:
        raise ValueError(f"--data {data} holds several ground truths: give one of them, e.g. --data {found[0]}.")
    return found[0] if found else None


def read_ground_truth(path: Path) -> GroundTruth:
    """The ground truth in a .pkl or .json file.

    Raises:
        ValueError: there is no such file, or it has not the published form.
    """
    if not path.is_file():
        raise ValueError(f"--data {path} does not exist; {LAYOUT}.")
    try:
        is_json = path.suffix == ".json"
        return _parse(path, json.loads(path.read_bytes()) if is_json else pickles.load_plain_pickle(path))
    except Exception as error:  # a damaged file fails in many ways
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{path} is no ground truth of the revisited benchmarks ({reason}): a dict of imlist, qimlist and gnd, with "
            "easy, hard, junk and bbx for each query."
        ) from error


def _parse(path: Path, content: Any) -> GroundTruth:
    database, queries = ([f"{name}.jpg" for name in content[key]] for key in ("imlist", "qimlist"))
    entries = list(content["gnd"])
    if len(entries) != len(queries) or not entries:
        raise ValueError(f"it has {len(queries)} queries but {len(entries)} entries in gnd")
    if any("\0" in name for name in database + queries):
        raise ValueError("an image has no proper name")
    lists = {key: [[int(i) for i in entry[key]] for entry in entries] for key in ("easy", "hard", "junk")}
    if any(not 0 <= i < len(database) for rows in lists.values() for row in rows for i in row):
        raise ValueError(f"a position lies outside its {len(database)} images")
    boxes = [tuple(float(x) for x in entry["bbx"]) for entry in entries]
    if any(len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]) for box in boxes):
        raise ValueError("a bbx is not left, top, right, bottom")
    name, folder = path.stem.removeprefix("gnd_"), path.parent / "jpg"
    return GroundTruth(str(path), name, folder, database, queries, boxes, **lists)


class Cropped(Subset):
    """The images of `whole`, each cut to its box, and shrunk as if its longer side before cutting became `size`."""

    def __init__(self, whole: Source, boxes: Sequence[tuple[float, ...]], size: int):
        super().__init__(whole, np.arange(len(whole)))
        self.boxes, self.size = boxes, size
        self.fingerprint = hashlib.sha256(f"{whole.fingerprint} {size} {boxes}".encode()).hexdigest()

    def read(self, index: int) -> np.ndarray:
        image = super().read(index)
        height, width = image.shape[:2]
        left, top, right, bottom = (max(round(x), 0) for x in self.boxes[index])
        part = image[top:bottom, left:right]
        if not part.size:
            raise BadImage(f"the box {self.boxes[index]} lies outside its {width} x {height} pixels")
        return shrink(part, max(1, round(self.size * max(part.shape[:2]) / max(height, width))))


# --- evaluation -----------------------------------------------------------------------------------------------------

DEPTHS = (1, 5, 10)
PUBLISHED = {"roxford5k": (224, 1), "rparis6k": (512, 3)}  # size and number of scales
AT_ONCE = 256  # queries that are ranked at once, at most
# Features of class folders by --scales.
POOLINGS: dict[int | None, tuple[Pooling, Resize]] = {
    None: ("cls", "as trained"),
    1: ("any size", "shrunk"),
    3: ("three scales", "shrunk"),
}


class Labeled(NamedTuple):
    features: Tensor  # [n, d], of length 1
    labels: np.ndarray  # int64 [n]


def score_rankings(
    rankings: np.ndarray, easy: list[list[int]], hard: list[list[int]], junk: list[list[int]]
) -> dict[str, float]:
    """Figures of the three protocols in percent, without those of a protocol in which no query has anything to find.

    Easy finds the easy images and ignores the hard ones, Medium finds both, Hard finds the hard and ignores the easy ones.
    """
    both = [a + b for a, b in zip(easy, hard, strict=True)]
    without_hard = [a + b for a, b in zip(junk, hard, strict=True)]
    without_easy = [a + b for a, b in zip(junk, easy, strict=True)]
    sets = {"easy": (easy, without_hard), "medium": (both, junk), "hard": (hard, without_easy)}
    return {
        f"{name}_{figure}": value
        for name, (relevant, ignored) in sets.items()
        for figure, value in average_queries(find_precisions(rankings, relevant, ignored, DEPTHS), DEPTHS).items()
    }


def score_classes(database: Labeled, queries: Labeled, own: np.ndarray | None) -> dict[str, float]:
    """Figures in percent where an image is to be found by all others of its class; {} where no class has others.

    Args:
        own: place of each query in the database, where it is ignored. None: it is not there.
    """
    rows, num_queries = [], len(queries.labels)
    classes = range(1 + max(database.labels.max(), queries.labels.max()))
    members = [np.flatnonzero(database.labels == label) for label in classes]
    itself = np.empty((num_queries, 0), int) if own is None else own[:, None]
    parts = [*split_rows(num_queries, max(len(database.labels), MOST_NUMBERS // AT_ONCE))]
    for part in track(parts, len(parts), "rankings"):
        similarity = queries.features[part] @ database.features.T
        rankings = similarity.argsort(dim=1, descending=True, stable=True).cpu().numpy()
        relevant = [members[label] for label in queries.labels[part]]
        ignored = [*itself[part]]
        relevant = [np.setdiff1d(*each, assume_unique=True) for each in zip(relevant, ignored, strict=True)]
        rows.append(find_precisions(rankings, relevant, ignored, DEPTHS))
    return average_queries(np.concatenate(rows), DEPTHS)


def find_floors(database: Source, queries: Source | None, edge: int) -> tuple[dict[str, dict[str, float]], str]:
    """The same figures of raw pixels and of color histograms, and of chance; and of which images, in words."""
    bank = read_views(database, np.array(evenly_spaced(len(database), BANK)), edge, "floors")
    rows = np.array(evenly_spaced(len(bank.indices), QUERIES))
    asked = Features(bank.values[rows], bank.indices[rows], [])
    if queries is not None:
        asked = read_views(queries, np.array(evenly_spaced(len(queries), QUERIES)), edge, "floors")
    labels = required(database.labels)[bank.indices]
    wanted = required((queries or database).labels)[asked.indices]
    own = rows if queries is None else None
    others = np.bincount(labels, minlength=1 + int(wanted.max()))[wanted] - (own is not None)
    chance = 100 * others[others > 0].mean() / (len(labels) - (own is not None)) if (others > 0).any() else 0.0
    found = {"chance": dict.fromkeys(("map", *(f"mp{k}" for k in DEPTHS)), float(chance))}
    for name, describe in describe_plainly(edge).items():
        x, y = (F.normalize(describe(part).values, dim=1) for part in (bank, asked))
        found[name] = score_classes(Labeled(x, labels), Labeled(y, wanted), own)
    return found, f"{len(wanted):,} queries and {len(labels):,} of the database"


def rank_classes(model: Backbone, options: RetrievalOptions, device: torch.device) -> Result:
    """`score_classes` of the images of class folders; each is a query for the others where there are no test images."""
    try:
        database, queries = open_labeled(options.data, options.val)
    except ValueError as error:
        raise ValueError(f"{error} It holds no ground truth either: {LAYOUT}.") from error
    size = options.size or model.view_size
    pooling, resize = POOLINGS[options.scales]
    sources = {"database": database} | ({} if queries is None else {"queries": queries})
    found = extract_comparable(model, options, device, size, pooling, resize, sources, every=False)
    bank, *others = (
        Labeled(found.features[part], required(source.labels)[found.indices[part]]) for part, source in sources.items()
    )
    asked = others[0] if others else bank
    figures = score_classes(bank, asked, None if others else np.arange(len(bank.labels)))
    if not figures:
        raise ValueError(f"no query of --data {options.data} has another image of its class to find; add images.")
    floors, images = find_floors(database, queries, min(size, LARGEST))
    who = "test images are the queries" if others else "each image is a query for the others"
    return Result(
        {f"retrieval_{name}": value for name, value in figures.items()},
        f"images of the same class by the cosine of [CLS] features at {size} pixels{found.whitened}; {who}",
        found.data,
        {"images in the database": len(bank.labels), "queries": len(asked.labels)},
        notes=(f"mAP to beat, on {images}: " + ", ".join(f"{name} {of['map']:.1f} %" for name, of in floors.items()),),
        floors={f"retrieval_{name}": {floor: of[name] for floor, of in floors.items()} for name in figures},
    )


def evaluate(model: Backbone, options: RetrievalOptions, device: torch.device) -> Result:
    """Exact rankings by the cosine of [CLS] features, in float32, of landmarks or of class folders."""
    path = find_ground_truth(options.data)
    return rank_classes(model, options, device) if path is None else rank_landmarks(path, model, options, device)


def rank_landmarks(path: Path, model: Backbone, options: RetrievalOptions, device: torch.device) -> Result:
    """`score_rankings` of the ground truth in the file `path`."""
    truth = read_ground_truth(path)
    size, scales = PUBLISHED.get(truth.name, (model.view_size, 3))
    size, scales = options.size or size, options.scales or scales
    database, queries = (
        open_listed(truth.folder, part, truth.path, LAYOUT) for part in (truth.database, truth.queries)
    )
    if cropped := options.protocol == "fixed":
        queries = Cropped(queries, truth.boxes, size)
    pooling = "three scales" if scales == 3 else "any size"
    sources: dict[str, Source] = {"database": database, "queries": queries}
    features, _, whitened, data = extract_comparable(model, options, device, size, pooling, "shrunk", sources)
    similarity = features["queries"] @ features["database"].T
    rankings = similarity.argsort(dim=1, descending=True, stable=True).cpu().numpy()
    figures = score_rankings(rankings, truth.easy, truth.hard, truth.junk)
    if not figures:
        raise ValueError(f"no query of {options.data} has an easy or a hard image to find; check the ground truth.")
    return Result(
        {f"{truth.name}_{name}": value for name, value in figures.items()},
        f"{options.protocol} protocol: cosine of [CLS] features at {'1, 1/sqrt(2) and 1/2 of ' * (scales == 3)}{size} "
        f"pixels (longer side), queries {'cropped to their boxes' if cropped else 'whole'}{whitened}",
        data,
        {"images in the database": len(truth.database), "queries": len(truth.queries)},
    )
