"""Linear classification of frozen features (paper section 4.1 and appendix F): the paper's protocol, and a fast sweep."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from dino import distributed, schedules
from dino.data.normalize import normalize
from dino.data.open import open_labeled_pair
from dino.data.sources import Source, Subset
from dino.eval.evaluate import Result, locate_work
from dino.eval.supervised import (
    LabeledBatch,
    LabeledBatches,
    compute_accuracies,
    draw_per_class,
    save_weights,
    train_supervised,
)
from dino.eval.sweep import Sweep, train_sweep
from dino.features import cache
from dino.features.extract import POOLINGS, Pooling, readable_labels
from dino.models import Backbone
from dino.options import required
from dino.options.evaluate import LinearOptions
from dino.weights import fingerprint

FAST_RATES, FAST_DECAYS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0), (0.0, 1e-5, 1e-4)

# Where each pooling's columns lie in the widest one that the model has, in units of its width.
COLUMNS: dict[Pooling, dict[Pooling, tuple[int, int]]] = {
    "last4+average": {"cls": (3, 4), "average": (4, 5), "last4": (0, 4), "cls+average": (3, 5)},
    "cls+average": {"cls": (0, 1), "average": (1, 2), "cls+average": (0, 2)},
}


# --- the two modes ---------------------------------------------------------------------------------------------------


def fast(model: Backbone, options: LinearOptions, train: Source, test: Source, device: torch.device) -> Result:
    """Sweep on a part of the training features, choose on the rest, train the chosen on all, judge on the test set."""
    size, digest, widest = options.size or model.image_size, fingerprint(model), widest_pooling(model)
    bank = cache.load_or_extract(model, digest, train, size, device, widest, progress="training images")
    asked = cache.load_or_extract(model, digest, test, size, device, widest, progress="test images")
    labels, wanted = readable_labels(train, bank, "training"), readable_labels(test, asked, "test")
    columns: dict[Pooling, tuple[int, int]] = {
        name: (a * model.embed_dim, b * model.embed_dim) for name, (a, b) in COLUMNS[widest].items()
    }
    if unknown := sorted(set(options.pooling or ()) - columns.keys()):
        raise ValueError(f"pooling '{unknown[0]}' needs four layers of tokens, which this model does not have.")
    columns = {name: columns[name] for name in options.pooling or columns}
    rates, decays = options.lr or FAST_RATES, options.weight_decay or FAST_DECAYS

    def sweep(columns: Mapping[Pooling, tuple[int, int]], rates: Sequence[float], decays: Sequence[float]) -> Sweep:
        scaled = [rate * min(options.batch_size, len(labels)) / 256 for rate in rates]
        return Sweep(columns, scaled, decays, len(train.classes), options.seed, device)

    held = torch.from_numpy(draw_per_class(labels.numpy(), options.held_out, options.seed, least=0))
    rest = torch.from_numpy(np.setdiff1d(np.arange(len(labels)), held.numpy()))
    if not len(held):
        raise ValueError(f"held_out is {options.held_out}, which is no image of any class here; raise it.")
    trial = sweep(columns, rates, decays)
    train_sweep(
        trial, bank.values[rest], labels[rest], options, device, f"{len(columns) * len(trial.points)} classifiers"
    )
    points = [(rate, decay) for rate in rates for decay in decays]
    grid: list[dict[str, Any]] = [
        {"pooling": name, "lr": lr, "weight_decay": decay, "held_out_top1": score}
        for name in columns
        for (lr, decay), score in zip(points, trial.top1(name, bank.values[held], labels[held], device), strict=True)
    ]
    best = max(grid, key=lambda entry: entry["held_out_top1"])
    name, lr, decay = best["pooling"], best["lr"], best["weight_decay"]
    if distributed.is_main():
        print(show_grid(grid, rates))
    final = sweep({name: columns[name]}, [lr], [decay])
    train_sweep(final, bank.values, labels, options, device, "the chosen one")
    scores = final.scores(name, asked.values.to(device))[:, 0].cpu()
    save_weights(options, "linear", final.head(name, 0), train.classes, pooling=name)
    return Result(
        {f"linear_{key}": value for key, value in compute_accuracies(scores, wanted).items()},
        f"linear classifiers on features of the evaluation view at {size} pixels, {options.epochs} epochs; of {len(grid)}, "
        f"{name} at lr {lr:g} x batch / 256 and decay {decay:g} was best on {len(held)} training images "
        f"({best['held_out_top1']:.2f} %), then trained on all",
        {"training": train.fingerprint, "test": test.fingerprint},
        {"training images": len(labels), "test images": len(wanted)},
        {"grid": grid},
    )


def show_grid(grid: list[dict[str, Any]], rates: Sequence[float]) -> str:
    """Held-out accuracies: a line for each pooling and decay, a column for each learning rate."""
    lines = ["held-out top-1, %" + " " * 10 + "".join(f"{f'lr {rate:g}':>9}" for rate in rates)]
    rows: dict[tuple[str, float], str] = {}
    for entry in grid:
        key = entry["pooling"], entry["weight_decay"]
        rows[key] = rows.get(key, "") + f"{entry['held_out_top1']:9.2f}"
    return "\n".join(lines + [f"{f'{name}, decay {decay:g}':<27}{row}" for (name, decay), row in rows.items()])


class FrozenTraining:
    """The paper's protocol: classifiers on features of random crops and flips, computed anew in every epoch."""

    def __init__(
        self, model: Backbone, pooling: Pooling, sweep: Sweep, epochs: int, per_epoch: int, test: tuple[Tensor, Tensor]
    ):
        self.pooling: Pooling = pooling
        self.model, self.sweep, self.test = model, sweep, test
        self.epochs, self.per_epoch = epochs, per_epoch
        self.history: list[list[float]] = []  # test accuracy of each classifier after each epoch

    @torch.no_grad()
    def step(self, step: int, batch: LabeledBatch) -> Tensor:
        images = normalize(batch.images.permute(0, 2, 3, 1).contiguous().to(torch.uint8)[None], self.model.in_channels)
        features = POOLINGS[self.pooling](self.model, images).float()
        scale = schedules.cosine(step // self.per_epoch, self.epochs, 1.0, 0.0)
        return self.sweep.step(features, batch.labels, batch.total, scale)

    def epoch_end(self, epoch: int) -> None:
        self.history.append(self.sweep.top1(self.pooling, *self.test, self.sweep.rates.device))

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.sweep.weights, "momenta": self.sweep.momenta, "history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.sweep.columns:
            self.sweep.weights[name].copy_(state["weights"][name])
            self.sweep.momenta[name].copy_(state["momenta"][name])
        self.history = state["history"]


def paper(model: Backbone, options: LinearOptions, train_on: Source, test: Source, device: torch.device) -> Result:
    """The paper's protocol; with several learning rates, the one best on held-out training images."""
    folder = locate_work(options, "linear")
    size, digest, original = options.size or model.image_size, fingerprint(model), options.protocol == "original"
    pooling: Pooling = options.pooling[0] if options.pooling else paper_pooling(model)
    rates, decays = options.lr or (0.001,), options.weight_decay or (0.0,)
    asked = cache.load_or_extract(model, digest, test, size, device, pooling, progress="test images")
    wanted, chosen_on = readable_labels(test, asked, "test"), "the only one"
    choice = (asked.values, wanted)
    if not original and len(rates) * len(decays) > 1:
        held = draw_per_class(required(train_on.labels), options.held_out, options.seed, least=0)
        shown = cache.load_or_extract(
            model, digest, Subset(train_on, held), size, device, pooling, progress="held-out images"
        )
        choice = (shown.values, readable_labels(Subset(train_on, held), shown, "held-out"))
        chosen_on = f"best on {len(held)} held-out training images"
        train_on = Subset(train_on, np.setdiff1d(np.arange(len(train_on)), held))
    batches = LabeledBatches(train_on, training_crops(size), size, options.batch_size, options.seed)
    scaled = [rate * batches.batch_size / 256 for rate in rates]
    columns: dict[Pooling, tuple[int, int]] = {pooling: (0, asked.values.shape[1])}
    classes, seed = len(train_on.classes), options.seed
    sweep = Sweep(columns, scaled, decays, classes, seed, device, sum_=distributed.sum_)
    trainee = FrozenTraining(model, pooling, sweep, options.epochs, batches.steps_per_epoch, choice)
    left_out = ("num_workers", "checkpoint_minutes", "json", "device", "model", "data", "val")
    identity = {k: v for k, v in dataclasses.asdict(options).items() if k not in left_out}
    identity |= {"data": train_on.fingerprint, "test images": test.fingerprint, "model": digest}
    workers, minutes = options.num_workers, options.checkpoint_minutes
    train_supervised(trainee, batches, options.epochs, folder, identity, minutes, device, workers)
    history = np.array(trainee.history)  # [epochs, classifiers]
    point = int((history.max(axis=0) if original else history[-1]).argmax())
    lr, decay = rates[point // len(decays)], decays[point % len(decays)]
    figures = compute_accuracies(sweep.scores(pooling, asked.values.to(device))[:, point].cpu(), wanted)
    if original:
        figures = {"top1": float(history[:, point].max()), "last_epoch_top1": figures["top1"]}
        chosen_on = "best on the test images, as is its epoch"
    save_weights(options, "linear", sweep.head(pooling, point), train_on.classes, pooling=pooling)
    return Result(
        {f"linear_{key}": value for key, value in figures.items()},
        f"the paper's linear protocol: {pooling} of random crops at {size} pixels, {options.epochs} epochs at batch "
        f"{batches.batch_size}, lr {lr:g} x batch / 256, decay {decay:g} ({chosen_on})",
        {"training": train_on.fingerprint, "test": test.fingerprint},
        {"training images": len(train_on), "test images": len(wanted)},
        {"epochs": history.tolist(), "lr": list(rates), "weight_decay": list(decays)},
    )


def training_crops(size: int) -> v2.Transform:
    """A random crop (8 % to all of the area, bilinear, as the reference resizes it) and a flip; uint8 [3, size, size]."""
    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()])


def widest_pooling(model: Backbone) -> Pooling:
    """What holds all poolings that the model has: four blocks' [CLS] and the patches, or the last layer's alone."""
    edge = model.image_size
    parameter = next(iter(model.parameters()))
    try:
        with torch.no_grad():
            model.tokens(parameter.new_zeros(1, model.in_channels, edge, edge), layers=4)
    except ValueError:
        return "cls+average"
    return "last4+average"


def paper_pooling(model: Backbone) -> Pooling:
    """What the paper classifies: four [CLS] of ViT-S and smaller, [CLS] and the mean patch of ViT-B and larger."""
    if widest_pooling(model) != "last4+average" or not model.has_attention:
        return "cls"
    return "cls+average" if model.embed_dim >= 768 else "last4"


def evaluate(model: Backbone, options: LinearOptions, device: torch.device) -> Result:
    train_on, test = open_labeled_pair(options.data, options.val)
    return (fast if options.mode == "fast" else paper)(model, options, train_on, test, device)
