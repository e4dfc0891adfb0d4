"""Training that starts from weights: options that follow from them, loading, and the center where it is missing.

With student, teacher, heads and center the first loss is that of the run that wrote the weights. Without the center the
teacher's outputs are off by their mean, which one pass over the data estimates. Without heads the prototypes are new and
the loss starts near ln K; the center is still needed, because the common part of trained features would look like a
collapse.
"""

from __future__ import annotations

import math
from typing import cast

import torch

from dino import distributed
from dino.data.loader import ViewBatches, iterate
from dino.engine import parallel
from dino.engine.train import Trainer
from dino.method import DINO
from dino.models import SIZES, Backbone
from dino.options import flatten, replace, required
from dino.options.train import TrainOptions
from dino.weights import Weights
from dino.weights.checks import load_strictly
from dino.weights.formats import fill_sizes, infer_head

PATCHES, LARGEST = "patch_embed.proj.weight", 224  # views of more pixels cost more than they teach
CENTER_IMAGES = 4096  # enough to estimate the mean to a small fraction of the deviation


def adopt(options: TrainOptions, start: Weights) -> TrainOptions:
    """`options` with the architecture and head of `start` where they were left open.

    Raises:
        ValueError: an option contradicts the weights; names both values.
    """
    usual, asked, found = flatten(TrainOptions()), flatten(options), fill_sizes(start.arguments)
    sizes = {name: asked[f"model.{name}"] for name in ("arch", "patch_size", "width", "depth", "num_heads")}
    if sizes["arch"] in SIZES and found["arch"] in SIZES:  # the sizes matter, not the name
        asked |= {f"model.{name}": value for name, value in fill_sizes(sizes).items()}
        found["arch"] = sizes["arch"]
    wanted = {f"model.{name}": found.get(name) for name in sizes}
    for name in ("stem", "in_channels", "pos_interp", "mean", "std", "interpolation", "resize", "crop"):
        wanted[f"model.{name}"] = found.get(name, usual[f"model.{name}"])
    wanted["model.stem"] = wanted["model.stem"] or "default"  # of weights that do not say it
    heads = start.part("teacher.head.")
    head = start.head or (infer_head(heads) if heads else {})
    # Fixed gains may be trained from here on; trained gains cannot be fixed at one.
    wanted |= {f"head.{name}": value for name, value in head.items() if not (name == "norm_last_layer" and value)}
    for name, value in wanted.items():
        if asked[name] not in (usual[name], value):
            raise ValueError(
                f"{name} is {asked[name]} but the weights of --init {options.init} have {value}; leave the option out, or "
                "start from other weights."
            )
    if heads:
        wanted["start.frozen_epochs"] = 0.0
    patch = next((value.shape[-1] for name, value in start.backbone().items() if name.endswith(PATCHES)), 32)
    edge = asked["views.global_size"] or min(LARGEST, found.get("eval_size") or found.get("image_size") or LARGEST)
    wanted["views.global_size"] = max(1, edge // patch) * patch
    wanted["views.local_size"] = max(1, round(edge * 96 / 224 / patch)) * patch
    return replace(options, {name: value for name, value in wanted.items() if asked[name] == usual[name]})


def initialize(method: DINO, start: Weights) -> str:
    """Load `start` into student, teacher and, where it has them, heads and center; returns what was loaded, in words.

    Positions learned for another image size are interpolated. A file with one network gives both.

    Raises:
        ValueError: names the keys and shapes that differ.
    """
    for role, network in (("student", method.student), ("teacher", method.teacher)):
        source = role if start.backbone(role) else "teacher"
        backbone = start.backbone(source)
        own = cast(Backbone, network.backbone)
        load_strictly(network.backbone, own.resize_positions(backbone), start.where)
        if head := start.part(f"{source}.head."):
            load_strictly(network.head, head, start.where)
    parts = ["student and teacher" if start.backbone("student") else "one backbone for student and teacher"]
    parts.append("their heads" if start.part("teacher.head.") else "no heads, so these are fresh")
    center = start.state.get("center.value")
    if start.part("teacher.head.") and center is not None:
        method.center.value.copy_(center)
        parts.append("the center")
    left_out = f" Left out: {', '.join(start.left_out)}." if start.left_out else ""
    return f"Starting from {start.where}: {', '.join(parts)}.{left_out}"


def needs_center(method: DINO, start: Weights) -> bool:
    known_center = start.part("teacher.head.") and "center.value" in start.state
    return not known_center and method.targets.moves_center


@torch.no_grad()
def estimate_center(trainer: Trainer, batches: ViewBatches) -> int:
    """Set the center to the mean of the teacher's outputs over the global views of `batches`, summed over ranks.

    One pass at most, and no more than some `CENTER_IMAGES` images; returns how many views were seen.
    """
    options, method = trainer.options, trainer.method
    steps = min(batches.steps_per_epoch, math.ceil(CENTER_IMAGES / required(options.batch_size)))
    total, count = torch.zeros_like(method.center.value), torch.zeros((), device=trainer.device)
    for batch in iterate(batches, 0, steps, required(options.data.num_workers), trainer.device.type == "cuda"):
        if not batch.prepared:
            continue  # nothing in it could be read
        with parallel.autocast(trainer.device, trainer.training_step.precision):
            scores = method.teacher(trainer.render_views(batch)[:1])
        total += scores.float().sum(dim=0)
        count += len(scores)
    method.center.value.copy_(distributed.sum_(total) / distributed.sum_(count))
    return int(count)
