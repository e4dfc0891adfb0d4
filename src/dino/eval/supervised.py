"""Shared by evaluations that train on labels: keyed batches, a training loop with exact resume, splits, accuracies."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from dino import distributed, files
from dino.data.loader import Bad, announce, iterate, read_with_stand_in
from dino.data.order import order_epoch
from dino.data.sources import Source
from dino.engine.checkpoint import Checkpoints
from dino.eval.evaluate import locate_result
from dino.features.extract import report_unreadable
from dino.machine import count_spare_cores
from dino.options import required
from dino.options.evaluate import EvalOptions, TrainedOptions
from dino.randomness import Stream, draw_words, seed_augmentation
from dino.terminal import Terminal
from dino.weights.checkpoints import are_finite, find_tensors

Transform = Callable[[Image.Image], Tensor]  # may draw from the global generators, seeded anew for each image


class LabeledBatch(NamedTuple):
    images: Tensor  # this rank's share [n, 3, size, size]
    labels: Tensor  # [n] int64
    total: int  # images in the batch of all ranks
    bad: Bad  # images of this rank that could not be read; others stand in


class LabeledBatches(Dataset[LabeledBatch]):
    """Item s is this rank's share of the batch of step s, a function of (seed, s) alone.

    Args:
        size: edge of the images that `transform` returns, pixels.
        repeats: copies of an image in a batch, each with its own augmentation (repeated augmentation as in DeiT: an epoch
            still has as many samples as there are images).
        group: each rank takes whole groups of this many samples, which may be mixed with each other.
        drop_last: leave out the last batch of an epoch if it is smaller.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        size: int,
        batch_size: int,
        seed: int,
        repeats: int = 1,
        group: int = 1,
        drop_last: bool = False,
    ):
        self.source, self.transform, self.size, self.seed = source, transform, size, seed
        self.batch_size, self.repeats, self.group = min(batch_size, len(source)), repeats, group
        self.steps_per_epoch = len(source) // self.batch_size if drop_last else -(-len(source) // self.batch_size)
        self.rank, self.ranks = distributed.rank(), distributed.world_size()
        self.labels = required(source.labels)

    def samples(self, step: int) -> tuple[list[tuple[int, int]], int]:
        """(image, copy) of this rank's samples at `step`, and how many all ranks have."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        order = order_epoch(self.seed, epoch, len(self.source))
        start = batch * self.batch_size
        positions = np.arange(start, min(start + self.batch_size, len(order)))
        # Copies of one image are moved apart, so that they are not mixed with each other.
        positions = positions[np.argsort(positions % self.repeats, kind="stable")]
        groups = np.array_split(np.arange(-(-len(positions) // self.group)), self.ranks)[self.rank]
        mine = positions[groups[0] * self.group : (groups[-1] + 1) * self.group] if len(groups) else positions[:0]
        return [(int(order[p // self.repeats]), int(p % self.repeats)) for p in mine], len(positions)

    def __getitem__(self, step: int) -> LabeledBatch:
        announce(self.source, lambda step: [index for index, _ in self.samples(step)[0]], step)
        samples, count = self.samples(step)
        images, labels, bad = [], [], Bad()
        for index, copy in samples:
            found = read_with_stand_in(self.source, index, bad, len(self.source))
            if found is None:
                raise ValueError(f"none of the {len(self.source)} training images can be read; check the data folder.")
            image, position = found
            seed_augmentation(self.seed, step // self.steps_per_epoch, index, copy)
            images.append(self.transform(Image.fromarray(image)))
            labels.append(int(self.labels[position]))
        stacked = torch.stack(images) if images else torch.zeros(0, 3, self.size, self.size)
        return LabeledBatch(stacked, torch.tensor(labels, dtype=torch.int64), count, bad)


class Trainee(Protocol):
    # One step of training; returns the loss, for the progress line.
    def step(self, step: int, batch: LabeledBatch) -> Tensor: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def train_supervised(
    trainee: Trainee,
    batches: LabeledBatches,
    epochs: int,
    folder: Path,
    identity: Mapping[str, Any],
    options: TrainedOptions,
    device: torch.device,
) -> None:
    """Train to the end, from the newest checkpoint in `folder` if there is one. A break does not change the result.

    Args:
        identity: everything the result depends on; a checkpoint with another identity is refused.

    Raises:
        ValueError: `folder` holds the checkpoint of another training.
    """
    checkpoints, terminal = Checkpoints(folder, keep=1), Terminal()
    identity, total = json.loads(json.dumps(identity)), epochs * batches.steps_per_epoch
    if start := _resume(trainee, checkpoints, identity):
        terminal.say(f"Resuming after step {start} of {total}.")
    distributed.barrier()  # all ranks have read the checkpoint before the main one writes the next
    saved = time.monotonic()
    num_workers = options.num_workers
    if num_workers is None:
        num_workers = count_spare_cores(distributed.world_size()) if device.type != "cpu" else 0
    bad: dict[str, str] = {}
    terminal.start(start, total)
    try:
        ready = iterate(batches, start, total, num_workers, pin_memory=device.type == "cuda")
        for step, batch in enumerate(ready, start):
            bad |= dict(batch.bad)
            loss = trainee.step(step, batch._replace(images=batch.images.to(device), labels=batch.labels.to(device)))
            done, epoch = step + 1, step // batches.steps_per_epoch
            if distributed.is_main() and (done == total or time.monotonic() - saved >= 60 * options.checkpoint_minutes):
                state = {"step": done, "trainee": trainee.state_dict(), "identity": identity}
                if not are_finite(find_tensors(state)):
                    raise ValueError(f"the training diverged before step {done}; choose a lower --lr.")
                checkpoints.save(done, state)
                saved = time.monotonic()
            epoch_ends = done % batches.steps_per_epoch == 0
            if epoch_ends or done % 50 == 0:
                now, status = f"epoch {epoch + 1}/{epochs}", f"loss {loss.item():.4f}"
                terminal.update(done, now, status)
                if epoch_ends and not terminal.live:
                    terminal.say(f"{now}  {status}")
    finally:
        terminal.stop()
    report_unreadable([entry for part in distributed.gather(bad) for entry in part.items()], "training")


def _resume(trainee: Trainee, checkpoints: Checkpoints, identity: Mapping[str, Any]) -> int:
    """Load the newest checkpoint into `trainee`; returns the number of steps done, 0 without a checkpoint."""
    if (found := checkpoints.load()) is None:
        return 0
    state = found.state
    if state["identity"] != identity:
        changed = [key for key in identity if state["identity"].get(key) != identity[key]]
        raise ValueError(
            f"{checkpoints.folder} holds a training with another {' and '.join(changed)}; repeat its command to go on "
            "with it, delete the folder, or choose another --json."
        )
    trainee.load_state_dict(state["trainee"])
    return state["step"]


def draw_per_class(labels: np.ndarray, share: float, seed: int, least: int = 1) -> np.ndarray:
    """Positions of a share of each class (rounded, at least `least`), in order. A larger share contains a smaller one."""
    draws = draw_words(Stream.CLASSES, seed, len(labels))
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        chosen.append(members[np.argsort(draws[members], kind="stable")][: max(least, round(share * len(members)))])
    return np.sort(np.concatenate(chosen))


def compute_accuracies(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1, top-5 (of five classes or more) and the mean of the classes' own top-1, in percent.

    Args:
        scores: [n, classes]; labels: [n].

    Raises:
        ValueError: scores are not finite.
    """
    if not scores.isfinite().all():
        raise ValueError("training diverged: the classifier's scores are not finite; lower --lr.")
    top = min(5, scores.shape[1])
    labels = labels.cpu()
    ranked = scores.topk(top, dim=1).indices.cpu() == labels[:, None]
    result = {"top1": 100 * ranked[:, 0].double().mean().item()}
    if top == 5:
        result["top5"] = 100 * ranked.any(dim=1).double().mean().item()
    right = torch.bincount(labels[ranked[:, 0]], minlength=scores.shape[1])
    present = torch.bincount(labels, minlength=scores.shape[1])
    result["class_mean"] = 100 * (right[present > 0] / present[present > 0]).double().mean().item()
    return result


def save_weights(
    options: EvalOptions, name: str, state: Mapping[str, Tensor], classes: tuple[str, ...], **about: str
) -> None:
    """Write trained weights and the names of the classes beside the result, if that is written."""
    path = locate_result(options, name)
    if path is None or not distributed.is_main():
        return
    file = path.with_suffix(".safetensors")
    tensors = {key: value.cpu().contiguous() for key, value in state.items()}
    with files.naming(file, "choose another --json"):
        file.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(file) as temporary:
            save_file(tensors, temporary, about | {"classes": "\n".join(classes)})
