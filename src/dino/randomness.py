"""Every stream of random numbers, named once. Nothing draws from a generator that is not keyed here.

A `Stream` is drawn from Philox, a counter-based generator: its numbers are a function of (seed, part, index), so a run does
not depend on the number of workers or ranks, and resuming needs no generator state. Networks and libraries that
draw from the global generators are given a seed before they draw (the functions below, in the same way keyed).
"""

from __future__ import annotations

import random
from enum import Enum

import numpy as np
import torch


class Stream(Enum):
    """What random numbers are for. The value is where the stream lies: second word of Philox's key, last of its counter.

    Streams of one seed never share a (key, counter), as long as parts are below 2**48.
    """

    ORDER = 0, 1  # part: epoch. Order of an epoch's samples, in training and in evaluations that train
    VIEWS = 0, 2  # part: epoch, index: sample. Crops and colors
    DROP_PATH = 0, 3  # index: step. Which residual branches are dropped
    SCENES = 0, 0  # part: position. The content of a drawn scene
    SCENE_LABELS = 2**63, 0  # part: block of ten scenes. Their classes
    HELD_OUT = int.from_bytes(b"held-out"), 0  # which images are held out
    CLASSES = int.from_bytes(b"classes"), 0  # which images make a share of each class
    FOLDS = int.from_bytes(b"folds"), 0  # which fold of cross-validation an image is in
    CENTERS = int.from_bytes(b"centers"), 0  # the first centers of k-means
    SELECTED = int.from_bytes(b"selected"), 0  # part: cluster. Which of its images are selected
    PATCHES = int.from_bytes(b"patches"), 0  # part: image. Which patches of an image are learned from


# The first "epoch" of `Stream.VIEWS` that no training reaches: the crops by which checks measure features.
CHECKS = 2**40


def open_stream(stream: Stream, seed: int, part: int = 0, index: int = 0) -> np.random.Generator:
    """The generator of one part of a stream: 2**128 Philox blocks that nothing else has."""
    base, number = stream.value
    key = np.array([seed % 2**64, base + part], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, index, number], np.uint64)))


def draw_words(stream: Stream, seed: int, count: int) -> np.ndarray:
    """uint64 [count], raw: unlike what NumPy makes of them, these never change between its versions."""
    return open_stream(stream, seed).bit_generator.random_raw(count)


def seed_weights(seed: int) -> None:
    """Seed PyTorch's global generator, from which modules draw their initial weights."""
    torch.manual_seed(seed)


def open_weights(seed: int) -> torch.Generator:
    """A generator of its own for the initial weights of a classifier."""
    return torch.Generator().manual_seed(seed)


def seed_step(seed: int, rank: int, step: int) -> None:
    """Seed PyTorch for one training step; timm's drop path draws from its global generator."""
    torch.manual_seed(int(np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64)[0]))


def seed_augmentation(seed: int, epoch: int, index: int, copy: int) -> None:
    """Seed the global generators for the augmentation of one copy of a labeled image."""
    _seed_libraries(seed, epoch, index, copy)


def seed_mixing(seed: int, step: int) -> None:
    """Seed the global generators for MixUp and CutMix at a step of fine-tuning, the same on all ranks.

    The key is also that of the augmentation of image `step` in epoch 1, and the next one that of some in epoch 2. This does
    no harm, because other kinds of numbers are drawn, and another key would change the result of every seed.
    """
    _seed_libraries(seed, 1, step)


def seed_finetuning_step(seed: int, rank: int, step: int) -> None:
    """Seed the global generators for the drop path of a step of fine-tuning."""
    _seed_libraries(seed, 2, rank, step)


def _seed_libraries(*key: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch."""
    words = np.random.SeedSequence(key).generate_state(3, np.uint32).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.manual_seed(words[2])
