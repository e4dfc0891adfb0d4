"""Few labels on frozen features: L2-regularized logistic regression, and k-NN beside it (paper table 10)."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino import distributed
from dino.data.labels import read_text
from dino.data.open import open_labeled_pair
from dino.data.sources import Source, Subset
from dino.eval import knn
from dino.eval.evaluate import Result
from dino.eval.floors import LARGEST
from dino.eval.supervised import compute_accuracies, draw_per_class
from dino.features import cache
from dino.features.neighbors import split_rows
from dino.models import Backbone
from dino.options import required
from dino.options.evaluate import LowshotOptions
from dino.randomness import Stream, draw_words
from dino.terminal import track

SHARES, K = (1.0, 10.0, 100.0), 20  # percent of each class; neighbors at most
CS = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
MAX_STEPS = 2000
SMALL = 2**27  # products of a step, a hundredth of a second on one core


def fit_logistic(features: Tensor, labels: Tensor, num_classes: int, c: float, start: Tensor | None = None) -> Tensor:
    """Weights [d, classes] that minimize sum of cross-entropies + |W|^2 / 2C, without intercept, in float64.

    L-BFGS minimizes over V, where W = S V and S makes the Hessian at W = 0 the identity. Without S, thousands of steps
    would not be enough, because the features of a model are often nearly parallel.

    Args:
        features: [n, d]; labels: [n].
        start: weights to begin with, as those of another C, which save steps. None: zeros.
    """
    x = features.double()
    if len(x) < x.shape[1]:
        # The weights lie in the space of the images: with an orthonormal basis of it, all is smaller.
        basis, coordinates = torch.linalg.qr(x.T)
        return basis @ fit_logistic(coordinates.T, labels, num_classes, c, None if start is None else basis.T @ start)
    hessian = x.T @ x / (len(x) * num_classes) + torch.eye(x.shape[1], dtype=x.dtype, device=x.device) / (c * len(x))
    values, vectors = torch.linalg.eigh(hessian)
    s, penalties = vectors * values.rsqrt(), 1 / (values[:, None] * c * len(x))
    first = x.new_zeros(x.shape[1], num_classes) if start is None else values.sqrt()[:, None] * (vectors.T @ start)
    v, x = first.requires_grad_(True), x @ s
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
        value, v.grad = objective(v, x, labels, penalties)
        return value

    with few_threads(x.numel() * num_classes):
        solver.step(closure)  # pyright: ignore[reportArgumentType] - a Tensor of one number does for a float
    return (s @ v).detach()


@contextlib.contextmanager
def few_threads(products: int) -> Iterator[None]:
    """One thread on a CPU where a step has few products: others would mostly wait for each other, above all on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if products < SMALL else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def objective(weights: Tensor, x: Tensor, labels: Tensor, penalties: Tensor | float) -> tuple[Tensor, Tensor]:
    """(Sum of cross-entropies) / n + sum of `penalties` * weights^2 / 2 of n images, and its gradient.

    It is computed in parts that fit in memory. `penalties` are [d, 1], or one number for all weights.
    """
    n, gradient = len(x), penalties * weights
    value = (gradient * weights).sum() / 2
    for rows in split_rows(n, 2 * weights.shape[1]):  # a float64 takes the memory of two numbers
        part = x[rows]
        log_p = (part @ weights).log_softmax(dim=1)
        picked = torch.arange(len(part), device=x.device), labels[rows]
        value = value - log_p[picked].sum() / n
        residual = log_p.exp_()
        residual[picked] -= 1
        gradient = gradient + part.T @ residual / n
    return value, gradient


def choose_c(x: Tensor, labels: Tensor, num_classes: int, folds: int, seed: int) -> float:
    """The C of best accuracy in cross-validation; the smallest of equally good ones."""
    fold = deal_folds(labels.cpu().numpy(), folds, seed)
    hits, weights = dict.fromkeys(CS, 0), None
    for part, c in track(itertools.product(range(folds), CS), folds * len(CS), "cross-validation"):
        out = torch.from_numpy(fold == part).to(x.device)
        if not out.any() or out.all():
            continue
        weights = fit_logistic(x[~out], labels[~out], num_classes, c, weights if c > CS[0] else None)
        hits[c] += int(((x[out].double() @ weights).argmax(dim=1) == labels[out]).sum())
    return max(CS, key=lambda c: hits[c])


def deal_folds(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """The fold of each image [n]. Every fold gets an equal share of each class, to within one image.

    Images are sorted by class, in random order within a class, and dealt out to the folds in turn.
    """
    draws = draw_words(Stream.FOLDS, seed, len(labels))
    fold = np.empty(len(labels), np.int64)
    fold[np.lexsort((draws, labels))] = np.arange(len(labels)) % folds
    return fold


def read_list(source: Source, file: str) -> np.ndarray:
    """Positions of the images in the list `file`, which has a path as in the folder or a bare file name per line.

    Raises:
        ValueError: the list is empty, or a name is missing or not unique.
    """
    lines = [line.strip().removeprefix("./") for line in read_text(file).splitlines()]
    wanted = [line for line in lines if line and not line.startswith("#")]
    places: dict[str, int | None] = {}
    for index in range(len(source)):
        name = source.name(index)
        for key in {name, Path(name).name}:
            places[key] = None if key in places else index
    for line in wanted:
        if places.get(line) is None:
            fault = "names two images" if line in places else "is no training image"
            raise ValueError(f"--list {file}: '{line}' {fault}; write paths as in the folder, e.g. {source.name(0)}.")
    if not wanted:
        raise ValueError(f"--list {file} names no image; write one per line.")
    return np.unique([required(places[line]) for line in wanted])


def evaluate(model: Backbone, options: LowshotOptions, device: torch.device) -> Result:
    """k-NN and logistic regression on L2-normalized [CLS] features of some of the training images."""
    train, test = open_labeled_pair(options.data, options.val)
    subsets = choose_subsets(train, options)
    name, fewest = min(subsets.items(), key=lambda subset: len(subset[1]))
    if len(fewest) < (options.k or 1):
        raise ValueError(
            f"k is {options.k}, but {name} of the training images are {len(fewest)}; lower --k or take more."
        )
    size, num_classes = options.size or model.view_size, len(train.classes)
    bank = cache.load_labeled(model, train, size, "training")
    queries = cache.load_labeled(model, test, size, "test")
    place = distributed.with_float64(device)
    x, asked = (F.normalize(part.values, dim=1).to(place) for part in (bank, queries))
    labels, wanted = bank.labels.to(place), queries.labels.to(place)
    figures, counts, chosen, floors = {}, {}, {}, {}
    for name, positions in subsets.items():
        rows = torch.from_numpy(np.flatnonzero(np.isin(bank.indices, positions))).to(place)
        few, few_labels = x[rows], labels[rows]
        k = options.k or min(K, len(rows))
        figures[f"knn_{name}_top1"] = knn.classify(few, few_labels, asked, wanted, (k,))[f"knn{k}_top1"]
        # All ranks compute the same from here on; they share only the features.
        c = options.c or choose_c(few, few_labels, num_classes, options.folds, options.seed)
        weights = fit_logistic(few, few_labels, num_classes, c)
        figures[f"logistic_{name}_top1"] = compute_accuracies(asked.double() @ weights, wanted)["top1"]
        counts[f"training images ({name})"], chosen[name] = len(rows), c
        known = train if len(positions) == len(train) else Subset(train, positions)
        floors[name] = knn.find_floors(known, test, min(size, LARGEST), (k,))
    distributed.barrier()
    how = "given" if options.c else f"chosen by {options.folds}-fold cross-validation"
    return Result(
        figures,
        f"[CLS] features at {size} pixels, L2-normalized: {options.k or K}-NN, and multinomial logistic regression without "
        f"intercept, C {how} ({', '.join(f'{name}: {c:g}' for name, c in chosen.items())})",
        {"training": train.fingerprint, "test": test.fingerprint},
        counts | {"test images": len(wanted)},
        {"c": chosen},
        tuple(found.describe(f" with {name}") for name, found in floors.items()),
        {f"{what}_{name}_top1": found.found for name, found in floors.items() for what in ("knn", "logistic")},
    )


def choose_subsets(train: Source, options: LowshotOptions) -> dict[str, np.ndarray]:
    """Name of each subset of the training images, mostly its share in percent, and its positions."""
    if options.list:
        found = [read_list(train, file) for file in options.list]
        named = {f"{100 * len(positions) / len(train):.3g}%": positions for positions in found}
        if len(named) < len(found):  # two lists have the same length
            named = {Path(file).stem: positions for file, positions in zip(options.list, found, strict=True)}
        return named
    labels = required(train.labels)
    shares = options.percent
    if shares is None:
        mean = len(labels) / len(train.classes)
        shares = [share for share in SHARES if share * mean >= 100][:2] or SHARES[-1:]
    return {f"{percent:g}%": draw_per_class(labels, percent / 100, options.seed) for percent in shares}
