"""Linear classification of frozen features (paper section 4.1 and appendix F): the paper's protocol, and a fast sweep."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from dino import distributed, schedules
from dino.data.normalize import normalize
from dino.data.open import open_labeled_pair
from dino.data.sources import Source, Subset
from dino.eval import knn, supervised
from dino.eval.evaluate import Result, locate_work
from dino.eval.floors import LARGEST
from dino.eval.sweep import Columns, Sweep, train_sweep
from dino.features import cache
from dino.features.cache import LabeledFeatures
from dino.features.extract import POOLINGS, Pooling
from dino.models import Backbone
from dino.options import required
from dino.options.evaluate import LinearOptions
from dino.weights import fingerprint

FAST_RATES, FAST_DECAYS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0), (0.0, 1e-5, 1e-4)

Floats = Sequence[float]

# The columns of each pooling in the widest pooling of a model, in units of the model's width.
COLUMNS: dict[Pooling, dict[Pooling, tuple[int, int]]] = {
    "last4+average": {"cls": (3, 4), "average": (4, 5), "last4": (0, 4), "cls+average": (3, 5)},
    "cls+average": {"cls": (0, 1), "average": (1, 2), "cls+average": (0, 2)},
}


# --- the two modes ---------------------------------------------------------------------------------------------------


def run_fast(model: Backbone, options: LinearOptions, train: Source, test: Source, device: torch.device) -> Result:
    """Train many classifiers on a part of the training features, choose one on the rest, and train it again on all."""
    size, widest = options.size or model.view_size, find_widest_pooling(model)
    bank = cache.load_labeled(model, train, size, "training", widest)
    asked = cache.load_labeled(model, test, size, "test", widest)
    width = model.embed_dim
    columns: Columns = {name: (a * width, b * width) for name, (a, b) in COLUMNS[widest].items()}
    if unknown := sorted(set(options.pooling or ()) - columns.keys()):
        raise ValueError(f"pooling '{unknown[0]}' needs four layers of tokens, which this model does not have.")
    columns = {name: columns[name] for name in options.pooling or columns}
    everything = np.arange(len(bank.labels))
    held = supervised.draw_per_class(bank.labels.numpy(), options.held_out, options.seed, least=0)
    if not len(held):
        raise ValueError(f"held_out is {options.held_out}, which is no image of any class here; raise it.")

    def train_on(rows: np.ndarray, columns: Columns, rates: Floats, decays: Floats, what: str) -> Sweep:
        scaled = [rate * min(options.batch_size, len(bank.labels)) / 256 for rate in rates]
        sweep = Sweep(columns, scaled, decays, len(train.classes), options.seed, device)
        train_sweep(sweep, bank.values[rows], bank.labels[rows], options, device, what)
        return sweep

    rates, decays = options.lr or FAST_RATES, options.weight_decay or FAST_DECAYS
    points = list(itertools.product(columns, rates, decays))
    trial = train_on(np.setdiff1d(everything, held), columns, rates, decays, f"{len(points)} classifiers")
    scores = [score for name in columns for score in trial.top1(name, bank.values[held], bank.labels[held])]
    grid = [
        {"pooling": name, "lr": lr, "weight_decay": decay, "held_out_top1": score}
        for (name, lr, decay), score in zip(points, scores, strict=True)
    ]
    name, lr, decay = points[best := int(np.argmax(scores))]
    final = train_on(everything, {name: columns[name]}, [lr], [decay], "the chosen one")
    figures = supervised.compute_accuracies(final.scores(name, asked.values.to(device))[:, 0].cpu(), asked.labels)
    supervised.save_weights(options, "linear", final.head(name, 0), train.classes, pooling=name)
    floors = knn.find_floors(train, test, min(size, LARGEST))
    return Result(
        {f"linear_{key}": value for key, value in figures.items()},
        f"linear classifiers on features of the evaluation view at {size} pixels, {options.epochs} epochs; of {len(grid)}, "
        f"{name} at lr {lr:g} x batch / 256 and decay {decay:g} was best on {len(held)} training images "
        f"({scores[best]:.2f} %), then trained on all",
        {"training": train.fingerprint, "test": test.fingerprint},
        {"training images": len(bank.labels), "test images": len(asked.labels)},
        {"grid": grid},
        (format_grid(grid, rates), floors.describe()),
        {"linear_top1": floors.found},
    )


def format_grid(grid: list[dict[str, Any]], rates: Floats) -> str:
    """A table of held-out accuracies: a line for each pooling and decay, a column for each learning rate."""
    rows = {"held-out top-1, %": "".join(f"{f'lr {rate:g}':>9}" for rate in rates)}
    for entry in grid:
        name = f"{entry['pooling']}, decay {entry['weight_decay']:g}"
        rows[name] = rows.get(name, "") + f"{entry['held_out_top1']:9.2f}"
    return "\n".join(f"{name:<27}{row}" for name, row in rows.items())


class FrozenTraining:
    """The paper's protocol: classifiers on features of random crops and flips, which differ in every epoch."""

    def __init__(
        self, model: Backbone, pooling: Pooling, sweep: Sweep, epochs: int, per_epoch: int, test: LabeledFeatures
    ):
        self.pooling: Pooling = pooling
        self.model, self.sweep, self.test = model, sweep, test
        self.epochs, self.per_epoch = epochs, per_epoch
        self.history: list[list[float]] = []  # test accuracy of each classifier after each epoch

    @torch.no_grad()
    def step(self, step: int, batch: supervised.LabeledBatch) -> Tensor:
        images = normalize(
            batch.images.permute(0, 2, 3, 1).contiguous().to(torch.uint8)[None], self.model.preprocessing
        )
        features = POOLINGS[self.pooling](self.model, images).float()
        scale = schedules.cosine(step // self.per_epoch, self.epochs, 1.0, 0.0)
        loss = self.sweep.step(features, batch.labels, batch.total, scale)
        if (step + 1) % self.per_epoch == 0:
            self.history.append(self.sweep.top1(self.pooling, self.test.values, self.test.labels))
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.sweep.weights, "momenta": self.sweep.momenta, "history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.sweep.columns:
            self.sweep.weights[name].copy_(state["weights"][name])
            self.sweep.momenta[name].copy_(state["momenta"][name])
        self.history = state["history"]


def run_paper(model: Backbone, options: LinearOptions, train: Source, test: Source, device: torch.device) -> Result:
    """The paper's protocol. Of several learning rates and decays, the one best on held-out training images counts."""
    folder = locate_work(options, "linear")
    size, original = options.size or model.view_size, options.protocol == "original"
    pooling: Pooling = options.pooling[0] if options.pooling else find_paper_pooling(model)
    rates, decays = options.lr or (0.001,), options.weight_decay or (0.0,)
    asked = cache.load_labeled(model, test, size, "test", pooling)
    choice, chosen_on = asked, "the only one"
    if not original and len(rates) * len(decays) > 1:
        held = supervised.draw_per_class(required(train.labels), options.held_out, options.seed, least=0)
        choice = cache.load_labeled(model, Subset(train, held), size, "held-out", pooling)
        chosen_on = f"best on {len(held)} held-out training images"
        train = Subset(train, np.setdiff1d(np.arange(len(train)), held))
    batches = supervised.LabeledBatches(train, build_crops(size), size, options.batch_size, options.seed)
    scaled = [rate * batches.batch_size / 256 for rate in rates]
    columns: Columns = {pooling: (0, asked.values.shape[1])}
    sweep = Sweep(columns, scaled, decays, len(train.classes), options.seed, device, sum_=distributed.sum_)
    trainee = FrozenTraining(model, pooling, sweep, options.epochs, batches.steps_per_epoch, choice)
    left_out = ("num_workers", "checkpoint_minutes", "json", "device", "model", "data", "val")
    identity = {k: v for k, v in dataclasses.asdict(options).items() if k not in left_out}
    identity |= {"data": train.fingerprint, "test images": test.fingerprint, "model": fingerprint(model)}
    supervised.train_supervised(trainee, batches, options.epochs, folder, identity, options, device)
    history = np.array(trainee.history)  # [epochs, classifiers]
    point = int((history.max(axis=0) if original else history[-1]).argmax())
    lr, decay = list(itertools.product(rates, decays))[point]
    figures = supervised.compute_accuracies(
        sweep.scores(pooling, asked.values.to(device))[:, point].cpu(), asked.labels
    )
    if original:
        figures = {"top1": float(history[:, point].max()), "last_epoch_top1": figures["top1"]}
        chosen_on = "best on the test images, as is its epoch"
    supervised.save_weights(options, "linear", sweep.head(pooling, point), train.classes, pooling=pooling)
    return Result(
        {f"linear_{key}": value for key, value in figures.items()},
        f"the paper's linear protocol: {pooling} of random crops at {size} pixels, {options.epochs} epochs at batch "
        f"{batches.batch_size}, lr {lr:g} x batch / 256, decay {decay:g} ({chosen_on})",
        {"training": train.fingerprint, "test": test.fingerprint},
        {"training images": len(train), "test images": len(asked.labels)},
        {"epochs": history.tolist(), "lr": list(rates), "weight_decay": list(decays)},
    )


def build_crops(size: int) -> v2.Transform:
    """A random crop (8 to 100 % of the area, resized bilinearly as in the reference) and flip: uint8 [3, size, size]."""
    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()])


def find_widest_pooling(model: Backbone) -> Pooling:
    """The pooling that contains all others of a model: [CLS] of four blocks and the patches, or of the last block only."""
    edge = model.view_size
    parameter = next(iter(model.parameters()))
    try:
        with torch.no_grad():
            model.tokens(parameter.new_zeros(1, model.in_channels, edge, edge), layers=4)
    except ValueError:
        return "cls+average"
    return "last4+average"


def find_paper_pooling(model: Backbone) -> Pooling:
    """The pooling that the paper uses: four [CLS] for ViT-S and smaller, [CLS] and the mean patch for ViT-B and larger."""
    if find_widest_pooling(model) != "last4+average" or not model.has_attention:
        return "cls"
    return "cls+average" if model.embed_dim >= 768 else "last4"


MODES = {"fast": run_fast, "paper": run_paper}


def evaluate(model: Backbone, options: LinearOptions, device: torch.device) -> Result:
    train, test = open_labeled_pair(options.data, options.val)
    return MODES[options.mode](model, options, train, test, device)
