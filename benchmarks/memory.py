"""Memory of one training step of ViT-S/16 with 2 x 224 + 10 x 96 views: ours, whole and recomputed, and the plain peer.

    python benchmarks/memory.py

Counted tensor by tensor on two small numbers of images, float32; the figure for 64 images is the line through these two,
not a measurement. With more images another moment of the step may become the peak. The paper's
15.4 GB for the reference are of float16 on a GPU, so compare ratios, not bytes.
"""

from __future__ import annotations

import torch

import harness
from step import Side, our_loss, plain_loss, sides, views

LOCALS, IMAGES = 10, 64


def added(side: Side, recompute: bool, plain: bool, images: int) -> int:
    """Bytes that teacher, student, loss and backward add to weights, gradients and the optimiser's state."""
    device = torch.device("cpu")
    side.method.student.backbone.set_grad_checkpointing(recompute)  # pyright: ignore[reportCallIssue]
    for p in side.method.student.parameters():
        p.grad = torch.zeros_like(p)
    groups = views(images, LOCALS, device)
    return harness.peak_bytes(lambda: side.backward((plain_loss if plain else our_loss)(side, groups)), device)


def main() -> None:
    parser = harness.parser(__doc__, "memory-cpu")
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--images", type=int, nargs=2, default=(1, 2), help="two numbers, the smaller first")
    options = harness.parse(parser)
    low, high = options.images
    if not 1 <= low < high:
        raise ValueError(f"--images is {low} {high}; give two numbers from 1 on, the smaller first.")
    ours, plain = sides(options.arch, options.prototypes, torch.device("cpu"), "fp32", "fp32")
    learnt = sum(p.numel() * p.element_size() for p in ours.method.student.parameters() if p.requires_grad)
    fixed = 5 * learnt  # student, teacher, gradients, and the two moments of AdamW
    ways = {"plain": (plain, False, True), "ours": (ours, False, False), "ours, recomputed": (ours, True, False)}
    figures, at = {}, f"bytes_at_{IMAGES}_images_extrapolated"
    for name, way in ways.items():
        few, more = fixed + added(*way, low), fixed + added(*way, high)
        line = round(few + (IMAGES - low) * (more - few) / (high - low))
        figures[name] = {f"bytes_{low}_images": few, f"bytes_{high}_images": more, at: line}
    result = {
        "what": "peak bytes of a step, weights and optimiser included; plain / ours",
        "peer": "the same mathematics written plainly",
        "arch": options.arch,
        "views": f"2 x 224 + {LOCALS} x 96",
        "prototypes": options.prototypes,
        "precision": "fp32",
        "bytes_of_weights_gradients_optimiser": fixed,
        **figures,
        "ratio_extrapolated": {name: figures["plain"][at] / figures[name][at] for name in list(ways)[1:]},
    }
    harness.write(result, options.json)


if __name__ == "__main__":
    harness.run(main)
