"""Memory of one training step of ViT-S/16 with 2 x 224 + 10 x 96 views: the trainer's, whole, in parts (`--accumulate`)
and with activations computed twice (`--recompute`), and the peer's.

    python benchmarks/memory.py [--reference CHECKOUT]
    python benchmarks/memory.py --device cuda --images 32 64

The peer is in fp16 as the reference ships it, ours in bf16 as on a GPU. On a CPU the tensors alive at most are counted, of
the types that a GPU would make them (its autocast takes softmaxes and norms in float32, a CPU's does not), on two small
numbers of images; the figure for 64 images is the line through these two, not a measurement. With more images another
moment of the step may become the peak. On a GPU 64 images are measured if they are the larger number.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import harness
from dino import run
from dino.engine.step import Split
from dino.models import vit
from dino.options import replace
from dino.options.train import TrainOptions
from dino.terminal import Terminal
from reference import Reference
from step import Plain, plain_loss, sides, views

LOCALS, IMAGES = 10, 64

WAYS = {
    "ours": Split(),
    "ours, elementwise": Split(1, "elementwise"),
    "ours, in 2 parts": Split(2),
    "ours, in 2 parts, elementwise": Split(2, "elementwise"),
    "ours, blocks": Split(1, "blocks"),
}


class AsOnGpu(TorchFunctionMode):
    """What CUDA's autocast takes in float32 and a CPU's does not, of what a step computes."""

    IN_FLOAT32 = (
        *(torch.softmax, F.softmax, Tensor.softmax, torch.log_softmax, F.log_softmax, Tensor.log_softmax),
        *(F.layer_norm, torch.norm, Tensor.norm, F.normalize, torch.sum, Tensor.sum),
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            half = torch.float16, torch.bfloat16
            args = [arg.float() if isinstance(arg, Tensor) and arg.dtype in half else arg for arg in args]
        return func(*args, **(kwargs or {}))


def added(student: nn.Module, step: Callable[[list[Tensor]], object], images: int, device: torch.device) -> int:
    """Bytes that teacher, student, loss and backward add to weights, gradients and the optimizer's state."""
    for p in student.parameters():
        p.grad = torch.zeros_like(p)
    groups = views(images, LOCALS, device)
    with contextlib.ExitStack() as stack:
        if device.type == "cpu":
            stack.enter_context(AsOnGpu())
            stack.enter_context(patch.object(vit, "FEW", 0))  # a GPU takes the kernel for every number of tokens
        return harness.peak_bytes(lambda: step(groups), device)


def peer_of(plain: Plain, arch: str, reference: Path | None) -> tuple[nn.Module, Callable[[list[Tensor]], object]]:
    if reference is not None:
        own = Reference(reference, plain.method, arch, 16, plain.device, plain.precision)
        student, scaler, backward = own.student, own.scaler, own.gradients
        own.optimizer.zero_grad = lambda *_, **__: None  # gradients count as there throughout, as ours
    else:
        student, scaler = plain.method.student, plain.scaler
        backward = lambda groups: plain.backward(plain_loss(plain, groups))  # noqa: E731

    def gradients(groups: list[Tensor]) -> None:
        backward(groups)
        scaler.update()  # only one backward pass is allowed between two of these

    return student, gradients


def main() -> None:
    parser = harness.parser(__doc__, "memory")
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--images", type=int, nargs=2, default=(4, 8), help="two numbers, the smaller first")
    parser.add_argument("--reference", type=Path, help="checkout of facebookresearch/dino to compare with")
    parser.add_argument("--device", default="cpu")
    options = harness.parse(parser)
    device = torch.device(options.device)
    low, high = options.images
    if not 4 <= low < high or low % 4 or high % 4:
        raise ValueError(f"--images is {low} {high}; give two multiples of 4, the smaller first.")
    _, plain = sides(options.arch, options.prototypes, device, "bf16", "fp16")
    learned = sum(p.numel() * p.element_size() for p in plain.method.student.parameters() if p.requires_grad)
    fixed = 5 * learned  # student, teacher, gradients, and the two moments of AdamW
    how = "" if high == IMAGES else "_extrapolated"
    figures, at = {}, f"bytes_at_{IMAGES}_images{how}"

    def add(name: str, student: nn.Module, step: Callable[[list[Tensor]], object]) -> None:
        few, more = (fixed + added(student, step, images, device) for images in (low, high))
        line = round(few + (IMAGES - low) * (more - few) / (high - low))
        figures[name] = {f"bytes_{low}_images": few, f"bytes_{high}_images": more, at: line}

    name_of_peer = "plain" if options.reference is None else "reference"
    add(name_of_peer, *peer_of(plain, options.arch, options.reference))
    wanted = {
        "model.arch": options.arch,
        "head.out_dim": options.prototypes,
        "head.num_layers": 3,
        "head.batch_norm": False,
        "optim.name": "adamw",
        "model.drop_path": 0.0,
        "batch_size": high,
        "precision": "bf16",
        "views.num_local": LOCALS,
        "model.patch_size": 16,
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = run.set_up(replace(TrainOptions(), wanted), Path(folder), device, Terminal(False))
        step = trainer.training_step
        for name, split in WAYS.items():
            step.set_split(split)
            add(name, step.student, lambda groups: step.compute_gradients(groups, 0.04))
    result = {
        "what": "peak bytes of a step, weights and optimizer included; peer / ours",
        "peer": "the same mathematics written plainly" if options.reference is None else "the reference's own step",
        "arch": options.arch,
        "views": f"2 x 224 + {LOCALS} x 96",
        "prototypes": options.prototypes,
        "precision": step.precision,
        "peer_precision": plain.precision,
        "bytes_of_weights_gradients_optimizer": fixed,
        **figures,
        f"ratio{how}": {name: figures[name_of_peer][at] / figures[name][at] for name in WAYS},
    }
    harness.write(result, options)


if __name__ == "__main__":
    harness.run(main)
