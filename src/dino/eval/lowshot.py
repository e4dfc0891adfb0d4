"""Few labels on frozen features: L2-regularized logistic regression, and k-NN beside it (paper table 10)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino import distributed
from dino.data.labels import read_text
from dino.data.open import open_labeled_pair
from dino.data.sources import Source
from dino.eval import knn
from dino.eval.evaluate import Result
from dino.eval.supervised import compute_accuracies, draw_per_class
from dino.features import cache
from dino.features.extract import readable_labels
from dino.models import Backbone
from dino.options import required
from dino.options.evaluate import LowshotOptions
from dino.randomness import Stream, draw_words
from dino.weights import fingerprint

CS = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
SCORES_AT_ONCE = 2**24  # 128 MB of float64
MAX_STEPS = 2000


def fit_logistic(features: Tensor, labels: Tensor, num_classes: int, c: float) -> Tensor:
    """Weights [d, classes] that minimize sum of cross-entropies + |W|^2 / 2C, without intercept, in float64.

    L-BFGS on W = S V, where S makes the Hessian at W = 0 the identity: features of one model are often nearly parallel,
    and without it thousands of steps would not be enough.

    Args:
        features: [n, d]; labels: [n].
    """
    x = features.double()
    hessian = x.T @ x / (len(x) * num_classes) + torch.eye(x.shape[1], dtype=x.dtype, device=x.device) / (c * len(x))
    values, vectors = torch.linalg.eigh(hessian)
    s = vectors * values.rsqrt() @ vectors.T
    v = x.new_zeros(x.shape[1], num_classes).requires_grad_(True)
    solver = torch.optim.LBFGS(
        [v],
        max_iter=MAX_STEPS,
        max_eval=2 * MAX_STEPS,
        tolerance_grad=1e-6,
        tolerance_change=1e-14,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def closure() -> Tensor:
        value, gradient = objective(s @ v, x, labels, c)
        v.grad = s @ gradient
        return value

    solver.step(closure)  # pyright: ignore[reportArgumentType] - it wants a float and takes what has one
    return (s @ v).detach()


def objective(weights: Tensor, x: Tensor, labels: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """Mean of the penalized loss over the n images, and its gradient; in parts, so that scores of all need not fit."""
    n = len(x)
    value, gradient = weights.square().sum() / (2 * c * n), weights / (c * n)
    rows = max(1, SCORES_AT_ONCE // weights.shape[1])
    for part, wanted in zip(x.split(rows), labels.split(rows), strict=True):
        log_p = (part @ weights).log_softmax(dim=1)
        picked = torch.arange(len(part), device=x.device), wanted
        value = value - log_p[picked].sum() / n
        residual = log_p.exp_()
        residual[picked] -= 1
        gradient = gradient + part.T @ residual / n
    return value, gradient


def choose_c(x: Tensor, labels: Tensor, num_classes: int, folds: int, seed: int) -> float:
    """The C of best accuracy in cross-validation; of equals the smallest. Folds hold like shares of each class."""
    fold = deal_folds(labels.cpu().numpy(), folds, seed)
    hits = dict.fromkeys(CS, 0)
    for part in range(folds):
        out = torch.from_numpy(fold == part).to(x.device)
        if not out.any() or out.all():
            continue
        for c in CS:
            weights = fit_logistic(x[~out], labels[~out], num_classes, c)
            hits[c] += int(((x[out].double() @ weights).argmax(dim=1) == labels[out]).sum())
    return max(CS, key=lambda c: hits[c])


def deal_folds(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """[n] number of the fold of each image; a class is dealt out in turn, and the next one goes on where it ended."""
    draws = draw_words(Stream.FOLDS, seed, len(labels))
    fold = np.empty(len(labels), np.int64)
    fold[np.lexsort((draws, labels))] = np.arange(len(labels)) % folds
    return fold


def read_list(source: Source, file: str) -> np.ndarray:
    """Positions of the images that `file` names, a line each: paths as in the folder, or bare file names.

    Raises:
        ValueError: it names none, or one that is not there or not unique.
    """
    lines = [line.strip().removeprefix("./") for line in read_text(file).splitlines()]
    wanted = [line for line in lines if line and not line.startswith("#")]
    places: dict[str, int | None] = {}
    for index in range(len(source)):
        name = source.name(index)
        for key in {name, Path(name).name}:
            places[key] = None if key in places else index
    for line in wanted:
        if places.get(line, -1) in (None, -1):
            fault = "names two images" if line in places else "is no training image"
            raise ValueError(f"--list {file}: '{line}' {fault}; write paths as in the folder, e.g. {source.name(0)}.")
    if not wanted:
        raise ValueError(f"--list {file} names no image; write one per line.")
    return np.unique([required(places[line]) for line in wanted])


def evaluate(model: Backbone, options: LowshotOptions, device: torch.device) -> Result:
    """k-NN and logistic regression on L2-normalized [CLS] features of some of the training images."""
    train, test = open_labeled_pair(options.data, options.val)
    parts = choose_subsets(train, options)
    name, fewest = min(((name, len(positions)) for name, positions in parts.items()), key=lambda part: part[1])
    if fewest < options.k:
        raise ValueError(f"k is {options.k}, but {name} of the training images are {fewest}; lower --k or take more.")
    size, digest, num_classes = options.size or model.image_size, fingerprint(model), len(train.classes)
    bank = cache.load_or_extract(model, digest, train, size, device, progress="training images")
    asked = cache.load_or_extract(model, digest, test, size, device, progress="test images")
    labels, wanted = (
        readable_labels(train, bank, "training").to(device),
        readable_labels(test, asked, "test").to(device),
    )
    x, queries = (F.normalize(found.values, dim=1).to(device) for found in (bank, asked))
    figures, counts, chosen = {}, {}, {}
    for name, positions in parts.items():
        rows = torch.from_numpy(np.flatnonzero(np.isin(bank.indices, positions))).to(device)
        few, few_labels = x[rows], labels[rows]
        votes = knn.classify(few, few_labels, queries, wanted, (options.k,))
        figures[f"knn_{name}_top1"] = votes[f"knn{options.k}_top1"]
        # Each rank does the same: what is shared is the work of the backbone.
        c = options.c or choose_c(few, few_labels, num_classes, options.folds, options.seed)
        weights = fit_logistic(few, few_labels, num_classes, c)
        figures[f"logistic_{name}_top1"] = compute_accuracies(queries.double() @ weights, wanted)["top1"]
        counts[f"training images ({name})"], chosen[name] = len(rows), c
    distributed.barrier()
    how = "given" if options.c else f"chosen by {options.folds}-fold cross-validation"
    return Result(
        figures,
        f"[CLS] features at {size} pixels, L2-normalized: {options.k}-NN, and multinomial logistic regression without "
        f"intercept, C {how} ({', '.join(f'{name}: {c:g}' for name, c in chosen.items())})",
        {"training": train.fingerprint, "test": test.fingerprint},
        counts | {"test images": len(wanted)},
        {"c": chosen},
    )


def choose_subsets(train: Source, options: LowshotOptions) -> dict[str, np.ndarray]:
    """Positions of the training images of each share, by its name in percent."""
    if options.list:
        found = [read_list(train, file) for file in options.list]
        named = {f"{100 * len(positions) / len(train):.3g}%": positions for positions in found}
        if len(named) < len(found):  # two lists of one length
            named = {Path(file).stem: positions for file, positions in zip(options.list, found, strict=True)}
        return named
    labels = required(train.labels)
    return {f"{percent:g}%": draw_per_class(labels, percent / 100, options.seed) for percent in options.percent}
