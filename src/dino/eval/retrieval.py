"""Landmark retrieval on revisited Oxford and Paris (paper table 3).

The benchmark is of Radenović et al. 2018. Each query has easy and hard images to find, and images that do not count
("junk"); the protocols Easy, Medium and Hard differ in which of them are to be found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dino.data.decode import BadImage
from dino.data.evaluation_views import shrink
from dino.data.image_files import open_listed
from dino.data.sources import Source, Subset
from dino.eval.evaluate import Result
from dino.eval.ranking import extract_comparable, mean_precisions
from dino.models import Backbone
from dino.options.evaluate import RetrievalOptions
from dino.weights import pickles

# --- ground truth ---------------------------------------------------------------------------------------------------

LAYOUT = "expected are DATA/gnd_roxford5k.pkl (or another gnd_NAME.pkl) and DATA/jpg/NAME.jpg"


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


def read_ground_truth(data: str) -> GroundTruth:
    """The ground truth in a folder, or in a .pkl file.

    Raises:
        ValueError: the folder is laid out otherwise, or the file has not the published form.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        found = sorted(path.glob("gnd_*.pkl"))
        if len(found) != 1:
            what = f"several: give one of them, e.g. --data {found[0]}" if found else f"none; {LAYOUT}"
            raise ValueError(f"--data {data} must hold one ground truth, gnd_NAME.pkl, and holds {what}.")
        path = found[0]
    if not path.is_file() or path.suffix != ".pkl":
        raise ValueError(f"--data {path} is neither a folder nor a .pkl file; {LAYOUT}.")
    try:
        return _parse(path, pickles.load_plain_pickle(path))
    except Exception as error:  # a damaged pickle fails in many ways
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
        for figure, value in mean_precisions(rankings, relevant, ignored, DEPTHS).items()
    }


def evaluate(model: Backbone, options: RetrievalOptions, device: torch.device) -> Result:
    """`score_rankings` of exact rankings by the cosine of [CLS] features, in float32."""
    truth = read_ground_truth(options.data)
    size, scales = PUBLISHED.get(truth.name, (model.view_size, 3))
    size, scales = options.size or size, options.scales or scales
    database, queries = (
        open_listed(truth.folder, part, truth.path, LAYOUT) for part in (truth.database, truth.queries)
    )
    if cropped := options.protocol == "fixed":
        queries = Cropped(queries, truth.boxes, size)
    pooling = "three scales" if scales == 3 else "any size"
    sources: dict[str, Source] = {"database": database, "queries": queries}
    features, whitened, data = extract_comparable(model, options, device, size, pooling, "shrunk", sources)
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
