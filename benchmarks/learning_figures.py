"""The figures of one run, or the floors of one set, for `learning.py`, which starts this as a process.

    python benchmarks/learning_figures.py SET --json FILE [--run RUN] [--linear] [--threads 1]

SET is a set of sets.toml as JSON. With a run: k-NN, linear probe and attention masks of its model, and the same without the
probe of its untrained network. Without one: k-NN of what needs no network, as votes are weighted for a model and plain.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import harness
from dino import files, weights
from dino.data.decode import BadImage
from dino.data.open import open_training_pair
from dino.data.scenes import Scenes
from dino.data.sources import Source, Subset
from dino.engine.build import build_method
from dino.eval import knn, linear, masks
from dino.eval.online import measure_scene_masks
from dino.features import cache
from dino.features.neighbors import find_neighbors
from dino.models import Backbone
from dino.options import replace, required, toml
from dino.options.evaluate import LinearOptions, MasksOptions
from dino.options.train import TrainOptions

KS = (10, 20)
EDGE, BINS = 16, 8  # of the thumbnail, pixels; of the histogram, for each color
ELLIPSE = 0.7
CPU = torch.device("cpu")

Figures = dict[str, float]
Vote = Callable[[Tensor, Tensor, Tensor, Tensor, Sequence[int]], Figures]


def open_labeled(options: TrainOptions) -> tuple[Source, Source] | None:
    """Training images and those to classify, without the ones that have no label; None: there are no labels."""
    train, test = open_training_pair(options, None)
    if test is None or train.labels is None or test.labels is None:
        return None
    known, asked = (Subset(part, np.flatnonzero(required(part.labels) >= 0)) for part in (train, test))
    return known, asked


def count_plain_votes(bank: Tensor, known: Tensor, queries: Tensor, truth: Tensor, ks: Sequence[int]) -> Figures:
    """As `knn.classify`, but each of the k neighbors has one vote."""
    near = find_neighbors(F.normalize(queries, dim=1), F.normalize(bank, dim=1), max(ks))[1]
    votes = {k: F.one_hot(known[near[:, :k]]).sum(1).argmax(1) for k in ks}
    return {f"knn{k}_top1": 100 * (votes[k] == truth).double().mean().item() for k in ks}


def measure_knn(bank: Tensor, known: Tensor, queries: Tensor, truth: Tensor, vote: Vote = knn.classify) -> Figures:
    """Top-1, and the mean of the classes' own top-1 ("knn10_class_mean"), for each of `KS` that the bank allows."""
    ks = [k for k in KS if k <= len(bank)]
    if not ks or not len(queries):
        return {}
    found = vote(bank, known, queries, truth, ks)
    classes = [vote(bank, known, queries[truth == label], truth[truth == label], ks) for label in truth.unique()]
    means = {f"knn{k}_class_mean": statistics.fmean(one[f"knn{k}_top1"] for one in classes) for k in ks}
    return {f"knn{k}_top1": found[f"knn{k}_top1"] for k in ks} | means


def measure_model(model: Backbone, wanted: dict[str, str], options: TrainOptions, probe: bool) -> Figures:
    """k-NN and, with `probe`, a linear classifier where there are labels; overlap of masks where there are objects."""
    figures, pair = {}, open_labeled(options)
    if pair is not None:
        bank, queries = (cache.load_labeled(model, part, model.image_size, "labeled") for part in pair)
        figures |= measure_knn(bank.values, bank.labels, queries.values, queries.labels)
        if probe:
            try:
                figures |= linear.run_fast(model, LinearOptions(model="", data=""), *pair, CPU).figures
            except ValueError as error:  # too few images of a class to choose a classifier on
                print(f"no linear probe: {error}")
        if isinstance(pair[1], Subset) and isinstance(pair[1].source, Scenes) and model.has_attention:
            figures |= measure_scene_masks(model, pair[1].source, model.image_size, CPU)
    if "masks" in wanted and model.has_attention:
        figures |= masks.evaluate(
            model, MasksOptions(model="", images=wanted["images"], masks=wanted["masks"]), CPU
        ).figures
    return figures


def describe_pixels(image: np.ndarray) -> np.ndarray:
    """The image as a thumbnail without its mean, as one vector."""
    small = np.asarray(Image.fromarray(image).resize((EDGE, EDGE), Image.Resampling.BILINEAR), np.float32)
    return (small - small.mean()).ravel()


def describe_colors(image: np.ndarray) -> np.ndarray:
    """Roots of a histogram of all pixels in bins of red, green and blue: the cosine is then Hellinger's likeness."""
    red, green, blue = (image.reshape(-1, 3).astype(np.int64) * BINS // 256).T
    counts = np.bincount((red * BINS + green) * BINS + blue, minlength=BINS**3)
    return np.sqrt(counts / counts.sum()).astype(np.float32)


def measure_floors(options: TrainOptions) -> dict[str, Figures]:
    """What a model must beat: thumbnails, histograms, and always the class that most training images have."""
    pair = open_labeled(options)
    if pair is None:
        return {}
    kinds: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        f"raw pixels, {EDGE}x{EDGE}": describe_pixels,
        f"color histogram, {BINS**3} bins": describe_colors,
    }
    vectors: dict[str, list[Tensor]] = {name: [] for name in kinds}
    labels = []
    for part in pair:
        rows: dict[str, list[np.ndarray]] = {name: [] for name in kinds}
        readable = []
        for index in range(len(part)):
            try:
                image = part.read(index)
            except BadImage:
                continue
            readable.append(index)
            for name, describe in kinds.items():
                rows[name].append(describe(image))
        for name in kinds:
            vectors[name].append(torch.from_numpy(np.stack(rows[name])))
        labels.append(torch.from_numpy(required(part.labels)[readable]))
    (known, truth), floors = labels, {}
    for name, (bank, queries) in vectors.items():
        floors[name] = measure_knn(bank, known, queries, truth)
        floors[f"{name}, plain votes"] = measure_knn(bank, known, queries, truth, count_plain_votes)
    share = 100 * (truth == known.bincount().argmax()).double().mean().item()
    of_class = 100 / len(truth.unique())
    majority = {f"knn{k}_{what}": value for k in KS for what, value in (("top1", share), ("class_mean", of_class))}
    return floors | {"majority class": majority}


def measure_mask_floors(images: str, mask_files: str) -> dict[str, Figures]:
    """Overlap of objects with the whole image, and with an ellipse in its center: one mask for all images."""
    sources = masks.open_masks(MasksOptions(model="", images=images, masks=mask_files))[1]
    overlaps: dict[str, list[float]] = {"everything an object": [], f"ellipse of {ELLIPSE:g} of the sides": []}
    for index in range(len(sources)):
        truth = masks.read_objects(Path(sources.root, sources.name(index))) > 0
        if truth.any():
            y, x = (np.linspace(-1, 1, edge) / ELLIPSE for edge in truth.shape)
            guesses = np.ones_like(truth), y[:, None] ** 2 + x**2 <= 1
            for found, guess in zip(overlaps.values(), guesses, strict=True):
                found.append(100 * (guess & truth).sum() / (guess | truth).sum())
    return {name: {"jaccard_best_head": statistics.fmean(found)} for name, found in overlaps.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", type=json.loads)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--linear", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    wanted = given.set
    options = TrainOptions() if given.run is None else toml.read_recorded(str(given.run))
    paths = {"data.path": wanted["train"], "data.val": wanted.get("test", wanted.get("val"))}
    options = replace(options, paths | {"data.labels": wanted.get("labels", "auto")})
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DINO_CACHE"] = folder  # features of models that nobody will load again
        if given.run is None:
            found: dict[str, Any] = measure_floors(options)
            if "masks" in wanted:
                found |= measure_mask_floors(wanted["images"], wanted["masks"])
        else:
            untrained = build_method(options).teacher.backbone.eval().requires_grad_(False)
            models: dict[str, nn.Module] = {"trained": weights.load(given.run), "untrained": untrained}
            found = {
                name: measure_model(cast(Backbone, model), wanted, options, given.linear and name == "trained")
                for name, model in models.items()
            }
    with files.replacing(given.json) as temporary:
        temporary.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    harness.run(main)
