"""Automatic choices: the values of all options that the user left open, from the data and the machine."""

from __future__ import annotations

import math
from typing import Any

from dino.options import replace
from dino.options.train import TrainOptions

LITTLE_DATA = 50_000  # below this number of images a run needs more epochs to have enough steps


def resolve(options: TrainOptions, num_images: int, image_edge: int, on_gpu: bool, cores: int) -> TrainOptions:
    """Fill in every option that is None from the data and the machine.

    Args:
        num_images: images to train on.
        image_edge: typical shorter side of the images, pixels.
        on_gpu: whether training runs on a GPU.
        cores: processor cores for data workers of one rank.
    """
    chosen: dict[str, Any] = {}

    def choose(name: str, value: Any) -> Any:
        section, _, leaf = name.rpartition(".")
        given = getattr(getattr(options, section) if section else options, leaf)
        if given is None:
            chosen[name] = value
        return value if given is None else given

    little = num_images < LITTLE_DATA
    size = choose("views.global_size", 32 if image_edge < 48 else 96 if not on_gpu else 224)
    nano = choose("model.arch", "vit_small" if on_gpu and not (little and size < 96) else "vit_nano") == "vit_nano"
    of_timm = (options.model.arch or "").startswith("timm:")  # has its own patch size, mostly 16 pixels
    patch = 16 if of_timm else choose("model.patch_size", 16 if size >= 128 else 8 if size >= 48 else 4)
    local = 96 if size == 224 else size // 2
    choose("views.local_size", max(patch, local // patch * patch))
    # Crops of few patches must share enough for their targets to agree (docs/experiments.md).
    choose("views.global_scale", (0.4, 1.0) if size >= 96 else (0.5, 1.0))
    choose("views.local_scale", (0.05, 0.4) if size >= 96 else (0.3, 0.9))
    choose("head.hidden_dim", 512 if nano else 2048)
    choose("head.bottleneck_dim", 128 if nano else 256)
    if options.head.prototypes:
        choose("head.out_dim", choose_prototypes(num_images))
    batch = choose("batch_size", max(1, min((32 if nano else 64) if little else 256, num_images // 4)))
    # Little data also needs thousands of steps; a million images need no more than 100 epochs.
    steps = max(1, num_images // batch)
    epochs = choose("epochs", min(800, max(100 if on_gpu else 10, round((20_000 if on_gpu else 4_000) / steps))))
    choose("optim.warmup_epochs", min(10, round(epochs / 10, 6)))
    choose("optim.lr", 8e-3 if nano else 5e-4)
    start = choose("method.teacher_temp_start", 0.03 if nano else 0.04)
    choose("method.teacher_temp", 0.07 if epochs >= 300 and not nano else start)
    choose("method.teacher_temp_epochs", min(30, round(0.3 * epochs, 6)))
    if options.method.teacher == "momentum":
        # In a short run a slow teacher stays close to its untrained start.
        choose("method.momentum", 0.99 if little else 0.996)
    choose("data.num_workers", cores)
    return replace(options, chosen)


def choose_prototypes(num_images: int) -> int:
    """About one prototype per eight images, a power of two between 256 and the paper's 65536."""
    return 2 ** min(16, max(8, math.ceil(math.log2(max(num_images, 1) / 8))))
