"""Training that starts from weights: options that follow from them, loading, and the centre where it is missing.

With student, teacher, heads and centre the first loss is that of the run the weights come from. Without the centre the
teacher's outputs are off by their mean, which one pass over the data restores. Without heads the prototypes are new and
the loss starts near ln K; what trained features have in common would still look like a collapse without the centre.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from dino import distributed
from dino.config import TrainOptions, known, replace
from dino.data.loader import ViewBatches, iterate
from dino.engine import parallel
from dino.engine.train import Trainer
from dino.method import DINO
from dino.models.formats import full_sizes, head_options
from dino.models.vit import SIZES, VisionTransformer, resize_positions
from dino.models.weights import Weights, load_strictly

CENTRE_IMAGES = 4096  # the mean over so many is known to a fraction of its spread


def adopt(options: TrainOptions, start: Weights) -> TrainOptions:
    """`options` with the architecture and head of `start` where they were left open.

    Raises:
        ValueError: an option contradicts the weights; names both values.
    """
    m, default = options.model, TrainOptions()
    found = full_sizes(start.arguments)
    given: dict[str, Any] = {name: getattr(m, name) for name in ("arch", "patch_size", "width", "depth", "num_heads")}
    if given["arch"] in SIZES and found["arch"] in SIZES:
        given = full_sizes(given) | {"arch": None}  # sizes matter, not the name they go by
    changes: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            changes[f"model.{name}"] = found.get(name)
        elif value != found.get(name):
            raise _contradiction(f"model.{name}", value, found.get(name), options)
    if options.views.global_size is None:
        changes["views.global_size"] = found.get("image_size")
    if m.arch is not None:
        changes.pop("model.arch", None)
    for name in ("stem", "in_channels", "pos_interp"):  # open as long as they are as usual
        usual = getattr(default.model, name)
        if getattr(m, name) == usual:
            changes[f"model.{name}"] = found.get(name, usual)
        elif getattr(m, name) != found.get(name, usual):
            raise _contradiction(f"model.{name}", getattr(m, name), found.get(name, usual), options)
    head = start.part("teacher.head.")
    sizes = dict(start.head or (head_options(head) if head else {}))
    if sizes.get("norm_last_layer"):
        del sizes["norm_last_layer"]  # gains of one may be trained from here on; trained ones cannot be one again
    for name, value in sizes.items():
        asked = getattr(options.head, name)
        if asked == getattr(default.head, name):
            changes[f"head.{name}"] = value
        elif asked != value:
            raise _contradiction(f"head.{name}", asked, value, options)
    return replace(options, changes)


def _contradiction(name: str, asked: Any, found: Any, options: TrainOptions) -> ValueError:
    return ValueError(
        f"{name} is {asked} but the weights of --init {options.init} have {found}; leave the option out, or start from "
        "other weights."
    )


def initialise(method: DINO, start: Weights) -> str:
    """Load `start` into student, teacher and, where it has them, heads and centre; says what was loaded.

    Positions learnt for another image size are interpolated. A file with one network gives both.

    Raises:
        ValueError: names the keys and shapes that differ.
    """
    for role, network in (("student", method.student), ("teacher", method.teacher)):
        source = role if start.backbone(role) else "teacher"
        backbone = start.backbone(source)
        own = network.backbone
        if isinstance(own, VisionTransformer) and "pos_embed" in backbone:
            rows, columns = own.grid(own.image_size, own.image_size)
            backbone["pos_embed"] = resize_positions(backbone["pos_embed"], rows, columns, own.pos_interp)
        load_strictly(network.backbone, backbone, start.where)
        if head := start.part(f"{source}.head."):
            load_strictly(network.head, head, start.where)
    parts = ["student and teacher" if start.backbone("student") else "one backbone for student and teacher"]
    parts.append("their heads" if start.part("teacher.head.") else "no heads, so these are fresh")
    centre = start.state.get("centre.value")
    if start.part("teacher.head.") and centre is not None:
        method.centre.value.copy_(centre)
        parts.append("the centre")
    left_out = f" Left out: {', '.join(start.left_out)}." if start.left_out else ""
    return f"Starting from {start.where}: {', '.join(parts)}.{left_out}"


def needs_centre(method: DINO, start: Weights) -> bool:
    known_centre = start.part("teacher.head.") and "centre.value" in start.state
    return not known_centre and method.targets == "centring"


@torch.no_grad()
def estimate_centre(trainer: Trainer, batches: ViewBatches) -> int:
    """Set the centre to the mean of the teacher's outputs over the global views of `batches`, summed over ranks.

    One pass at most, and no more than some `CENTRE_IMAGES` images; returns how many views were seen.
    """
    options, method = trainer.options, trainer.method
    steps = min(batches.steps_per_epoch, math.ceil(CENTRE_IMAGES / known(options.batch_size)))
    total, count = torch.zeros_like(method.centre.value), torch.zeros((), device=trainer.device)
    for batch in iterate(batches, 0, steps, known(options.data.num_workers), trainer.device.type == "cuda"):
        if not batch.prepared:
            continue  # nothing in it could be read
        with parallel.autocast(trainer.device, trainer.precision):
            scores = method.teacher(trainer.views_of(batch)[:1])
        total += scores.float().sum(dim=0)
        count += len(scores)
    method.centre.value.copy_(distributed.sum_(total) / distributed.sum_(count))
    return int(count)
