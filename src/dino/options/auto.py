"""Automatic choices: the values of all options that the user left open, from the data and the machine."""

from __future__ import annotations

import math
from typing import Any

from dino.options import replace
from dino.options.train import TrainOptions

LITTLE_DATA = 20_000  # images; fewer than that, or any number on a CPU, have a recipe of their own


def resolve(options: TrainOptions, num_images: int, image_edge: int, on_gpu: bool, cores: int) -> TrainOptions:
    """Fill in every option that is None from the data and the machine.

    Much data on a GPU gets the paper's choices. Little data, or little time, which on a CPU it always is, gets what learned
    most in minutes (docs/experiments.md): a small ConvNet, Muon, BatchNorm in the head, and as the loss one image against the
    others of its step. Where prototypes are asked for, targets are shared evenly among them (Sinkhorn).

    Args:
        num_images: images to train on.
        image_edge: typical shorter side of the images, pixels.
        on_gpu: whether training runs on a GPU.
        cores: processor cores for data workers of one rank.
    """
    choose = Choices(options)
    little = not on_gpu or num_images < LITTLE_DATA
    own = "resnet_nano" if not on_gpu else "timm:resnet18" if little else "vit_small"
    batch = choose("batch_size", max(1, min(64 if little else 256, num_images // 4)))
    # Weights to start from know another method than this one, unless their head shows that they come from it.
    little = little and (options.init is None or options.model.arch == own or options.head.prototypes is False)
    arch = choose("model.arch", own)
    choose("views.num_local", 0 if options.method.frozen else 2 if little or not on_gpu else 8)
    choose_views(choose, arch, 32 if image_edge < 48 else 64 if not on_gpu else 128 if little else 224, little)
    choose_method(choose, num_images, little, nano="_nano" in arch)
    # Little data also needs thousands of steps; a million images need no more than 100 epochs.
    steps = max(1, num_images // batch)
    continued = options.init is not None
    epochs = min(800, max(100 if on_gpu else 10, round((20_000 if on_gpu else 8_000) / steps)))
    choose_schedules(choose, epochs, little, continued)
    choose("data.num_workers", cores)
    return replace(options, choose.chosen)


class Choices:
    """Values for the options that are None in `options`."""

    def __init__(self, options: TrainOptions):
        self.options = options
        self.chosen: dict[str, Any] = {}

    def __call__(self, name: str, value: Any) -> Any:
        """What the user gave for the option `name`; else `value`, which is chosen then."""
        given = self.given(name)
        if given is None:
            self.chosen[name] = value
        return value if given is None else given

    def given(self, name: str) -> Any:
        section, _, leaf = name.rpartition(".")
        return getattr(getattr(self.options, section) if section else self.options, leaf)


def choose_views(choose: Choices, arch: str, size: int, little: bool) -> None:
    """The views, of which the global ones have `size` pixels, and what of the backbone depends on them."""
    size = choose("views.global_size", size)
    with_patches = arch.startswith("vit_")
    patch = choose("model.patch_size", 16 if size >= 128 else 8 if size >= 48 else 4) if with_patches else 1
    if with_patches or size >= 48:
        choose("model.stem", "default")
    else:
        choose("model.stem", "half" if "_nano" in arch else "small" if "resnet" in arch else "default")
    local = 96 if size == 224 else size // 2
    choose("views.local_size", max(patch, local // patch * patch))
    # Crops of few pixels must share enough for their targets to agree.
    choose("views.global_scale", (0.25, 1.0) if little else (0.4, 1.0) if size >= 96 else (0.5, 1.0))
    choose("views.local_scale", (0.1, 0.5) if little else (0.05, 0.4) if size >= 96 else (0.3, 0.9))
    choose("views.blur_prob", (0.0, 0.0, 0.0) if little else (1.0, 0.1, 0.5))


def choose_method(choose: Choices, num_images: int, little: bool, nano: bool) -> None:
    """The loss, the teacher and the heads."""
    of_prototypes = ("head.out_dim", "head.prototypes", "method.teacher_temp", "method.targets")
    asks_prototypes = any(map(choose.given, of_prototypes))
    frozen = choose.options.method.frozen is not None
    has_none = choose.given("head.prototypes") is False  # a head of weights to start from, for example
    usual = "infonce" if has_none or (little and not asks_prototypes) else "cross-entropy"
    loss = choose("method.loss", "cosine" if frozen else usual)
    targets = "sinkhorn" if little and loss != "mse" else "centering"
    choose("method.targets", "none" if loss in ("infonce", "cosine") else targets)
    choose("method.queue_size", 0 if little else 65536)
    choose("method.student_temp", 0.2 if loss == "infonce" else 0.1)
    if frozen or choose.given("method.teacher") == "momentum":
        # In a short run a slow teacher stays close to its untrained start.
        choose("method.momentum", 0.99 if frozen else 0.996 if not little else 0.9 if loss == "infonce" else 0.97)
    choose("model.drop_path", 0.0 if little else 0.1)
    choose("head.num_layers", 2 if little else 3)
    choose("head.batch_norm", little)
    choose("head.hidden_dim", 512 if nano else 2048)
    choose("head.bottleneck_dim", 128 if nano else 256)
    if choose("head.prototypes", loss == "cross-entropy"):
        choose("head.out_dim", choose_prototypes(num_images))


def choose_schedules(choose: Choices, epochs: float, little: bool, continued: bool) -> None:
    """The optimizer, and what changes in the course of a run of so many `epochs`, which may start from weights."""
    epochs = choose("epochs", epochs)
    choose("log.knn_every", choose_check_interval(epochs))
    choose("optim.name", "muon" if little else "adamw")
    choose("optim.lr", 8e-3 if little else 1e-4 if continued else 5e-4)
    choose("optim.layer_decay", 0.8 if continued and not little else 1.0)
    if continued:
        choose("start.frozen_epochs", round(0.05 * epochs, 6))
    choose("optim.warmup_epochs", min(10, round(epochs / 10, 6)))
    start = choose("method.teacher_temp_start", 0.03 if little else 0.04)
    choose("method.teacher_temp", 0.07 if epochs >= 300 and not little else start)
    choose("method.teacher_temp_epochs", min(30, round(0.3 * epochs, 6)))


def choose_check_interval(epochs: float, checks: float = 20) -> float:
    """Epochs between about so many checks, of which there is no more than one an epoch."""
    return max(1.0, round(epochs / checks))


def choose_prototypes(num_images: int) -> int:
    """About one prototype per eight images, a power of two between 256 and the paper's 65536."""
    return 2 ** min(16, max(8, math.ceil(math.log2(max(num_images, 1) / 8))))
