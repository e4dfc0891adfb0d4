"""Learning curves of the fast paths against the plain step, from the same weights on the same views.

    python benchmarks/curves.py --images FOLDER [--device cuda]

FOLDER holds a folder of images per class. Every way trains the same ViT with AdamW at a fixed rate; 'plain' is the step of
`step.py`, 'plain, other views' differs from it in nothing but the seed of the views: what chance alone changes. Loss is
averaged over WINDOW steps; the difference is from the plain curve. k-NN (k = 20) is on a tenth of the images.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import harness
import step
from dino.data.device_render import DeviceRenderer
from dino.data.image_files import open_source
from dino.data.loader import ViewBatches, iterate
from dino.data.normalize import normalize
from dino.data.render import CpuRenderer
from dino.data.sources import Source, hold_out
from dino.engine import parallel
from dino.engine.step import draw_drop_path_noise
from dino.eval import knn
from dino.features.extract import extract
from dino.method import DINO
from dino.options.train import ViewOptions

RATE, WINDOW = 5e-4, 20  # learning rate; steps


class Way(NamedTuple):
    plain: bool = False
    precision: str = "fp32"
    compiled: bool = False
    on_device: bool = False
    seed: int = 0


WAYS = {
    "plain": Way(plain=True),
    "plain, other views": Way(plain=True, seed=1),
    "ours": Way(),
    "ours, bf16": Way(precision="bf16"),
    "ours, compiled": Way(compiled=True),
    "ours, views rendered on the device": Way(on_device=True),
}


def train(way: Way, source: Source, options: Any, steps: int) -> tuple[list[float], DINO]:
    """Losses of all steps, and what was trained."""
    device, size = torch.device(options.device), options.size
    sizes = options.patch, size, step.DROP_PATH
    ours, plain = step.sides(options.arch, options.prototypes, device, way.precision, "fp32", *sizes)
    method, one = (plain.method, functools.partial(step.plain_step, plain)) if way.plain else (ours.method, ours)
    if way.compiled:
        parallel.compile_networks(method)
    rates = step.RATES._replace(lr=RATE)
    edges = {"global_size": size, "local_size": size // 2}
    views = ViewOptions(
        **edges, num_local=options.num_local, global_scale=(0.4, 1.0), local_scale=(0.1, 0.4), blur_prob=(1.0, 0.1, 0.5)
    )
    renderer = DeviceRenderer(device) if way.on_device else CpuRenderer()
    batches = ViewBatches(source, views, renderer, options.batch, way.seed)
    losses: list[float] = []
    for number, batch in enumerate(iterate(batches, 0, steps, options.workers, pin_memory=False)):
        assert batch.views is not None
        groups = renderer.finish(batch.prepared, batch.views)
        sizes = (way.seed, number, ours.backbone.num_drop_path, views.sizes, options.batch, batches.share)
        noise = draw_drop_path_noise(*sizes, device)  # all ways drop the same branches
        if way.plain:
            noise = [of_group.flatten(1) for of_group in noise]
        losses.append(float(one([normalize(group.to(device)) for group in groups], rates, noise)["loss"]))
    return losses, method


def accuracy(method: DINO, source: Source, held_out: Source, size: int) -> float:
    model = method.teacher.backbone.eval()
    (bank, labels), (queries, truth) = (_features(model, part, size) for part in (source, held_out))
    return knn.classify(bank, labels, queries, truth)["knn20_top1"]


def _features(model: Any, source: Any, size: int) -> tuple[Tensor, Tensor]:
    found = extract(model, source, size)
    return found.values, torch.from_numpy(np.asarray(source.labels)[found.indices])


def draw(result: dict[str, Any], path: Path) -> None:
    """Every way's curve, and how far it is from the plain one."""
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        plain = np.array(result["ways"]["plain"]["curve"])
        steps = WINDOW * (1 + np.arange(len(plain)))
        for name, way in result["ways"].items():
            curve, dotted = np.array(way["curve"]), ":" if "other views" in name else "-"
            wide = {"color": "silver", "lw": 5} if name == "plain" else {"lw": 1.2}  # the others lie on it
            left.plot(steps, curve, label=f"{name}: 20-NN {way['knn20_top1']:.1f} %", ls=dotted, **wide)
            right.plot(steps, np.maximum(np.abs(curve - plain), 1e-7), ls=dotted, **wide)
        left.set(xlabel="step", ylabel=f"loss, mean of {WINDOW} steps")
        left.set_title(f"Loss; 20-NN of the untrained network {result['knn20_top1_untrained']:.1f} %", loc="left")
        right.set(xlabel="step", ylabel="difference of loss", yscale="log", ylim=(2e-7, None))
        right.set_title("Difference from the plain step's curve", loc="left")
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, dpi=150)


def main() -> None:
    parser = harness.parser(__doc__, "curves")
    parser.add_argument("--images", type=Path, required=True, help="folder with a folder of images per class")
    parser.add_argument("--arch", default="vit_nano")
    parser.add_argument("--patch", type=int, default=4)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--num-local", type=int, default=2)
    parser.add_argument("--prototypes", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--picture", type=Path, help="PNG or SVG to draw them in")
    options = harness.parse(parser)
    source, held_out = hold_out(open_source(str(options.images)), 0.1, 1000, 0)
    if source.labels is None:
        raise ValueError(
            f"--images {options.images} holds no classes; give a folder with a folder of images per class."
        )
    assert held_out is not None
    result: dict[str, Any] = {
        "what": f"loss (mean of {WINDOW} steps) and k-NN of the fast paths against the plain step",
        "peer": "the same mathematics written plainly",
        "arch": f"{options.arch}/{options.patch}, {options.size} pixels",
        "images": len(source),
        "batch": options.batch,
        "steps": options.steps,
        "knn20_top1_untrained": accuracy(train(Way(), source, options, 0)[1], source, held_out, options.size),
        "ways": {},
    }
    plain = None
    for name, way in WAYS.items():
        losses, method = train(way, source, options, options.steps)
        curve = np.array(losses)[: len(losses) // WINDOW * WINDOW].reshape(-1, WINDOW).mean(1)
        plain = curve if plain is None else plain
        result["ways"][name] = {
            "largest_difference": float(np.abs(curve - plain).max()),
            "last_loss": float(curve[-1]),
            "knn20_top1": accuracy(method, source, held_out, options.size),
            "curve": [round(float(value), 7) for value in curve],
        }
        print(name, {k: v for k, v in result["ways"][name].items() if k != "curve"}, file=sys.stderr)
        harness.write(result, options)
    if options.picture is not None:
        draw(result, options.picture)


if __name__ == "__main__":
    harness.run(main)
