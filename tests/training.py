"""A trainer of seconds, and the ways to train that tests compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dino.data.image_files import open_source
from dino.engine.train import Trainer
from dino.options import replace
from dino.options.train import TrainOptions, ViewOptions
from dino.run import build_batches
from dino.terminal import Terminal
from helpers import TINY

SMALL_VIEWS = ViewOptions(
    global_size=32,
    local_size=16,
    num_local=3,
    global_scale=(0.4, 1.0),
    local_scale=(0.05, 0.4),
    blur_prob=(1.0, 0.1, 0.5),
)


def build_trainer(images: Path, folder: Path, **changes: Any) -> Trainer:
    named = {name.replace("__", "."): value for name, value in changes.items()}
    options = replace(
        TrainOptions(), TINY | {"data.path": str(images), "batch_size": 6, "model.drop_path": 0.3} | named
    )
    source = open_source(str(images), "none")
    batches = build_batches(options, source, torch.device("cpu"))
    return Trainer(options, folder / "run", source, batches, torch.device("cpu"), Terminal(False))


VARIANTS: dict[str, dict[str, Any]] = {
    "dino": {},
    "no multi-crop": {"views.num_local": 0},
    "sinkhorn": {"method.targets": "sinkhorn"},
    "byol": {"method.loss": "mse", "method.targets": "none", "head.prototypes": False, "head.predictor": True},
    "mocov2": {"method.loss": "infonce", "method.targets": "none", "head.prototypes": False, "method.queue_size": 24},
    "mocov3": {"method.loss": "infonce", "method.targets": "none", "head.prototypes": False, "method.queue_size": 0},
}
