"""TODO."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dino import distributed
from dino.data.decode import BadImage
from dino.data.scenes import Scenes, parse_scenes
from dino.data.sources import Source, evenly_spaced, hold_out, open_source, subset
from dino.data.torchvision_sets import TORCHVISION, open_torchvision
from dino.options import required
from dino.options.train import TrainOptions

MOST_HELD_OUT = 1000


HELD_OUT_SCENES = 500


def split_folders(data: str, val: str | None) -> tuple[str, str | None]:
    """Training and test folders of `data` where it holds train/ and val/; else itself and what was given."""
    root = Path(data)
    if val is None and (root / "train").is_dir() and (root / "val").is_dir():
        return str(root / "train"), str(root / "val")
    return data, val


def open_labeled_pair(data: str, val: str | None) -> tuple[Source, Source]:
    """Labeled training and test images that agree on their classes.

    Raises:
        ValueError: there are no class folders, too few images, or the classes differ.
    """
    train, val = split_folders(data, val)
    if (scenes := open_scenes(train)) is not None:
        return scenes
    if train.startswith(TORCHVISION):
        return open_torchvision(train)
    bank = open_labeled(train)
    if len(bank.classes) < 2:
        raise ValueError(
            f"--data {data} has one class only, '{''.join(bank.classes)}'; give a folder of two classes or more, or one with "
            "such folders train/ and val/."
        )
    if val is not None:
        return require_same_classes(bank, open_labeled(val))
    bank, test = hold_out(bank, 0.1, MOST_HELD_OUT, 0)
    if test is None:
        raise ValueError(f"--data {data} holds too few images to set some aside; give test images with --val.")
    return bank, test


def open_labeled(path: str) -> Source:
    """The images of a folder that lie in one of its class folders."""
    source = open_source(path, "folders")
    labels = required(source.labels)
    if (labels >= 0).all():
        return source
    if distributed.is_main():
        print(f"{(labels < 0).sum()} images of {path} lie in no class folder and are left out.")
    return subset(source, np.flatnonzero(labels >= 0))


def open_scenes(spec: str) -> tuple[Scenes, Scenes] | None:
    """Training and held-out drawn scenes where `spec` is 'scenes' or 'scenes:NUMBER'."""
    scenes = parse_scenes(spec)
    return None if scenes is None else (scenes, Scenes(HELD_OUT_SCENES, first=len(scenes)))


def require_same_classes(train: Source, test: Source) -> tuple[Source, Source]:
    """Both, if their class numbers mean the same; numbers are given by each folder on its own."""
    if train.classes and test.classes and train.classes != test.classes:
        only = min(set(train.classes) ^ set(test.classes))
        raise ValueError(
            f"training and held-out images differ in their classes, for example '{only}'; make them agree "
            "(training also works with --data.labels none)."
        )
    return train, test


def probe(source: Source, most: int = 16) -> int:
    """Read a few images before any work is spent; the median of their shorter sides, pixels.

    Raises:
        ValueError: none of them can be read.
    """
    edges, reasons = [], []
    for i in evenly_spaced(len(source), most):
        try:
            edges.append(min(source.read(i).shape[:2]))
        except BadImage as error:
            reasons.append(f"{source.name(i)}: {error.reason}")
    if not edges:
        raise ValueError(
            f"none of the {len(reasons)} images tried can be read (for example {reasons[0]}); check the data folder."
        )
    return int(np.median(edges))


def open_training_pair(options: TrainOptions, folder: Path | None, trust: bool) -> tuple[Source, Source | None]:
    """Training and held-out images; the run directory `folder` records which, and with `trust` it is just those."""
    spec = options.data.path
    if (scenes := open_scenes(spec)) is not None:
        return scenes
    record = None if folder is None else folder / "files.jsonl"
    source = open_source(spec, options.data.labels, record, trust)
    if options.data.val is not None:
        return require_same_classes(source, open_source(options.data.val, options.data.labels))
    return hold_out(source, options.data.val_fraction, MOST_HELD_OUT, options.seed)


def open_images(spec: str) -> Source:
    """The images that `spec` stands for: a folder or list, 'scenes:NUMBER', or a torchvision set's training images."""
    if (scenes := parse_scenes(spec)) is not None:
        return scenes
    return open_torchvision(spec)[0] if spec.startswith(TORCHVISION) else open_source(spec)


def expand_images(images: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Each image once, as an absolute path, and whether it was named itself rather than found in a folder."""
    found: dict[str, bool] = {}
    for spec in images:
        path = os.path.abspath(os.path.expanduser(spec))
        if os.path.isdir(path) or path.lower().endswith((".txt", ".csv")):
            source = open_source(spec, labels="none")
            for i in range(len(source)):
                found.setdefault(os.path.normpath(os.path.join(source.root, source.name(i))), False)
        elif not os.path.exists(path):
            raise ValueError(f"there is no image '{spec}'; check the path.")
        else:
            found[path] = True
    if not found:
        raise ValueError("no image was given; name image files or folders.")
    yield from found.items()
