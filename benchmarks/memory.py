"""Memory of one training step of ViT-S/16 with 2 x 224 + 10 x 96 views: the trainer's, whole, in parts (`--accumulate`)
and with activations computed twice (`--recompute`), and the plain peer's.

    python benchmarks/memory.py
    python benchmarks/memory.py --device cuda --images 32 64

On a CPU counted tensor by tensor on two small numbers of images, float32; the figure for 64 images is the line through
these two, not a measurement. With more images another moment of the step may become the peak. The paper's 15.4 GB for the
reference are of float16 on a GPU, so compare ratios, not bytes. On a GPU the peer is in fp16 and ours in the trainer's
own choice, and 64 images are measured if they are the larger number.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import harness
from dino import api
from dino.config import TrainOptions, replace
from dino.engine.log import Terminal
from dino.engine.memory import Split
from step import plain_loss, sides, views

LOCALS, IMAGES = 10, 64


WAYS = {
    "ours": Split(1, recompute=False),
    "ours, in 2 parts": Split(2, recompute=False),
    "ours, in 4 parts": Split(4, recompute=False),
    "ours, recomputed": Split(1, recompute=True),
}


def added(student: nn.Module, step: Callable[[list[Tensor]], object], images: int, device: torch.device) -> int:
    """Bytes that teacher, student, loss and backward add to weights, gradients and the optimiser's state."""
    for p in student.parameters():
        p.grad = torch.zeros_like(p)
    groups = views(images, LOCALS, device)
    return harness.peak_bytes(lambda: step(groups), device)


def main() -> None:
    parser = harness.parser(__doc__, "memory")
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--images", type=int, nargs=2, default=(4, 8), help="two numbers, the smaller first")
    parser.add_argument("--device", default="cpu")
    options = harness.parse(parser)
    device = torch.device(options.device)
    peer_precision = "fp16" if device.type == "cuda" else "fp32"
    low, high = options.images
    if not 4 <= low < high or low % 4 or high % 4:
        raise ValueError(f"--images is {low} {high}; give two multiples of 4, the smaller first.")
    _, plain = sides(options.arch, options.prototypes, device, "fp32", peer_precision)
    learnt = sum(p.numel() * p.element_size() for p in plain.method.student.parameters() if p.requires_grad)
    fixed = 5 * learnt  # student, teacher, gradients, and the two moments of AdamW
    how = "" if high == IMAGES else "_extrapolated"
    figures, at = {}, f"bytes_at_{IMAGES}_images{how}"

    def add(name: str, student: nn.Module, step: Callable[[list[Tensor]], object]) -> None:
        few, more = (fixed + added(student, step, images, device) for images in (low, high))
        line = round(few + (IMAGES - low) * (more - few) / (high - low))
        figures[name] = {f"bytes_{low}_images": few, f"bytes_{high}_images": more, at: line}

    def plain_gradients(groups: list[Tensor]) -> None:
        plain.backward(plain_loss(plain, groups))
        plain.scaler.update()  # only one backward pass is allowed between two of these

    add("plain", plain.method.student, plain_gradients)
    wanted = {
        "model.arch": options.arch,
        "head.out_dim": options.prototypes,
        "model.drop_path": 0.0,
        "batch_size": high,
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = api.set_up(
            replace(TrainOptions(), wanted | {"views.num_local": LOCALS, "model.patch_size": 16}),
            Path(folder),
            device,
            Terminal(False),
        )
        for name, split in WAYS.items():
            trainer.split_steps(split)
            add(name, trainer.method.student, lambda groups: trainer.gradients(groups, 0.04))
    result = {
        "what": "peak bytes of a step, weights and optimiser included; plain / ours",
        "peer": "the same mathematics written plainly",
        "arch": options.arch,
        "views": f"2 x 224 + {LOCALS} x 96",
        "prototypes": options.prototypes,
        "precision": trainer.precision,
        "peer_precision": peer_precision,
        "bytes_of_weights_gradients_optimiser": fixed,
        **figures,
        f"ratio{how}": {name: figures["plain"][at] / figures[name][at] for name in WAYS},
    }
    harness.write(result, options)


if __name__ == "__main__":
    harness.run(main)
