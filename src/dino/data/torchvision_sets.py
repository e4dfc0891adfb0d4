"""Data sets on the disk that torchvision reads: `torchvision:NAME:FOLDER`. Nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset

from dino import errors
from dino.data.decode import BadImage
from dino.data.sources import Source

# name -> (arguments of each part of the training set, arguments of the test set, attribute with the labels)
_SETS: dict[str, tuple[tuple[dict[str, Any], ...], dict[str, Any], str]] = {
    "CIFAR10": (({"train": True},), {"train": False}, "targets"),
    "CIFAR100": (({"train": True},), {"train": False}, "targets"),
    # Transfer papers train on both of its small parts: 2,040 images.
    "Flowers102": (({"split": "train"}, {"split": "val"}), {"split": "test"}, "_labels"),
    "StanfordCars": (({"split": "train"},), {"split": "test"}, "_samples"),
    "ImageNet": (({"split": "train"},), {"split": "val"}, "targets"),
}


class TorchvisionSet:
    """One or several parts of a torchvision data set, one after the other."""

    def __init__(self, name: str, root: str, parts: list[Any], labels_in: str):
        self.images: ConcatDataset[Any] = ConcatDataset(parts)
        entries = [entry for part in parts for entry in getattr(part, labels_in)]
        self.labels = np.array([entry[1] if labels_in == "_samples" else entry for entry in entries], np.int64)
        known = getattr(parts[0], "classes", None) or range(int(self.labels.max()) + 1)
        self.classes = tuple(str(entry) for entry in known)
        described = json.dumps([name, *(repr(part).replace(root, "") for part in parts)]).encode()
        self.fingerprint = hashlib.sha256(described + self.labels.astype("<i8").tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"image {index}"

    def stamp(self) -> str:
        return self.fingerprint  # published sets do not change

    def read(self, index: int) -> np.ndarray:
        try:
            image, _ = self.images[index]
            return np.array(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise BadImage(f"damaged ({error})") from error


def open_torchvision(spec: str) -> tuple[Source, Source]:
    """Training and test images of 'torchvision:NAME:FOLDER'.

    Raises:
        ValueError: an unknown name, or its files do not lie in the folder.
    """
    from torchvision import datasets

    name, _, root = spec.partition(":")[2].partition(":")
    if name not in _SETS or not root:
        raise ValueError(f"--data {spec}: write torchvision:NAME:FOLDER with one of the names {', '.join(_SETS)}.")
    train, test, labels_in = _SETS[name]
    root = os.path.abspath(os.path.expanduser(root))  # so that the fingerprint does not depend on how it is written
    try:
        parts = [getattr(datasets, name)(root, **arguments) for arguments in (*train, test)]
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"--data {spec}: torchvision finds no complete {name} there ({errors.first_line(error)}); nothing is "
            "downloaded, so put its files where torchvision expects them."
        ) from error
    return TorchvisionSet(name, root, parts[:-1], labels_in), TorchvisionSet(name, root, parts[-1:], labels_in)
