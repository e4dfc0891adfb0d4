"""One full training step (teacher, student, loss, backward, clipping, AdamW, EMA): ours against the same mathematics
written plainly, alternating in one process.

    python benchmarks/step.py --arch vit_small --batch 8 --pairs 5 [--reference CHECKOUT]

The peer computes explicit softmax attention in every block, one log-softmax per pair of views, and loops over
parameters for clipping, AdamW and the teacher, as the reference does; with `--reference` it is the reference's own code
from a checkout of facebookresearch/dino. Ratios first: peer time / our time.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import harness
from dino.bench import measure_matrix_rate
from dino.engine import optim, parallel
from dino.engine.step import Rates, Split, TrainingStep
from dino.method import DINO, Network
from dino.models import Head, Recompute, create
from dino.models.vit import Attention, Block, VisionTransformer
from dino.options.train import OptimOptions
from reference import Reference

DROP_PATH = 0.1  # as the reference and we train by default
RATES = Rates(lr=1e-4, weight_decay=0.04, momentum=0.996, teacher_temp=0.04)


class PlainAttention(nn.Module):
    def __init__(self, ours: Attention):
        super().__init__()
        self.qkv, self.proj, self.num_heads = ours.qkv, ours.proj, ours.num_heads

    def forward(self, x: Tensor, only_cls: bool = False) -> Tensor:
        n, t, d = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        weights = ((qkv[0] @ qkv[1].transpose(-2, -1)) * (d // self.num_heads) ** -0.5).softmax(dim=-1)
        return self.proj((weights @ qkv[2]).transpose(1, 2).reshape(n, t, d))


class PlainBlock(nn.Module):
    """The whole last block, whether or not only [CLS] is read."""

    def __init__(self, ours: Block):
        super().__init__()
        self.norm1, self.norm2, self.mlp, self.drop_path = ours.norm1, ours.norm2, ours.mlp, ours.drop_path
        self.attn = PlainAttention(ours.attn)

    def forward(self, x: Tensor, only_cls: bool = False, drop_path_noise: Tensor | None = None) -> Tensor:
        first, second = (None, None) if drop_path_noise is None else drop_path_noise.unbind()
        x = x + self._drop(self.attn(self.norm1(x)), first)
        return x + self._drop(self.mlp(self.norm2(x)), second)

    def _drop(self, x: Tensor, draw: Tensor | None) -> Tensor:
        """Stochastic depth that computes what it drops."""
        if not (self.training and self.drop_path.rate):
            return x
        keep = 1 - self.drop_path.rate
        kept = x.new_empty(len(x)).bernoulli_(keep) if draw is None else draw < keep
        return x * (kept / keep)[:, None, None]


def plain_copy(method: DINO) -> DINO:
    plain = copy.deepcopy(method)
    for network in (plain.student, plain.teacher):
        assert isinstance(network.backbone, VisionTransformer)
        plain_blocks = [PlainBlock(block) for block in network.backbone.blocks if isinstance(block, Block)]
        network.backbone.blocks = nn.ModuleList(plain_blocks)
    return plain


class Plain:
    """The plain peer: a method, and what a step of it needs."""

    def __init__(self, method: DINO, optimizer: torch.optim.Optimizer, device: torch.device, precision: str):
        self.method, self.optimizer, self.device, self.precision = method.to(device), optimizer, device, precision
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)


def plain_loss(side: Plain, groups: list[Tensor], noise: list[Tensor] | None = None) -> Tensor:
    method = side.method
    with parallel.autocast(side.device, side.precision):
        with torch.no_grad():
            teacher = method.teacher(groups[:1])
        student = (method.student(groups, noise) / 0.1).chunk(sum(len(g) for g in groups) // (len(groups[0]) // 2))
        targets = ((teacher - method.center.value) / 0.04).softmax(dim=-1).chunk(2)
        terms = [
            -(q * F.log_softmax(s, dim=-1)).sum(dim=-1).mean()
            for i, q in enumerate(targets)
            for v, s in enumerate(student)
            if v != i
        ]
        method.center.value.mul_(0.9).add_(0.1 * teacher.mean(dim=0))
        return torch.stack(terms).mean()


def plain_step(
    side: Plain, groups: list[Tensor], rates: Rates = RATES, noise: list[Tensor] | None = None
) -> dict[str, Tensor]:
    loss, method = plain_loss(side, groups, noise), side.method
    optim.set_rates(side.optimizer, rates.lr, rates.weight_decay)
    side.optimizer.zero_grad()
    side.backward(loss)
    for p in method.student.parameters():
        if p.grad is not None:
            coefficient = 3.0 / (p.grad.norm() + 1e-6)
            if coefficient < 1:
                p.grad.mul_(coefficient)
    side.scaler.step(side.optimizer)
    side.scaler.update()
    with torch.no_grad():
        for t, s in zip(method.teacher.parameters(), method.student.parameters(), strict=True):
            t.mul_(rates.momentum).add_((1 - rates.momentum) * s)
    return {"loss": torch.tensor(loss.item())}  # read back, as the reference does


def build(arch: str, prototypes: int, patch: int = 16, size: int = 224, drop_path: float = 0.0) -> DINO:
    torch.manual_seed(0)
    backbones = create(arch, patch, size, drop_path=drop_path), create(arch, patch, size)
    student, teacher = (Network(b, Head(b.embed_dim, prototypes)) for b in backbones)
    return DINO(student, teacher)


def sides(
    arch: str,
    prototypes: int,
    device: torch.device,
    precision: str,
    peer_precision: str,
    patch: int = 16,
    size: int = 224,
    drop_path: float = 0.0,
) -> tuple[TrainingStep, Plain]:
    """Ours and the peer, on the device, from the same weights."""
    ours = build(arch, prototypes, patch, size, drop_path).to(device)
    plain = plain_copy(ours)
    plain_optimizer = torch.optim.AdamW(optim.group_parameters(plain.student), lr=0.0, weight_decay=0.04)
    our_optimizer = optim.create_optimizer(OptimOptions(name="adamw"), ours.student)
    return TrainingStep(ours, our_optimizer, device, precision), Plain(plain, plain_optimizer, device, peer_precision)


def peer_of(
    plain: Plain, arch: str, patch: int, reference: Path | None
) -> tuple[nn.Module, Callable[[list[Tensor]], float]]:
    """The student and the step of the plain peer, or of the reference from the same weights."""
    if reference is None:
        return plain.method.student, lambda groups: plain_step(plain, groups)["loss"].item()
    peer = Reference(reference, plain.method, arch, patch, plain.device, plain.precision)
    return peer.student, peer.step


def views(images: int, num_local: int, device: torch.device) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(v * images, 3, s, s, device=device) for v, s in ((2, 224), (num_local, 96))]


def measure(
    arch: str,
    batch: int,
    prototypes: int,
    pairs: int,
    device: torch.device,
    precision: str = "fp32",
    peer_precision: str = "fp32",
    compiled: bool = False,
    patch: int = 16,
    reference: Path | None = None,
    recompute: Recompute = "nothing",
) -> dict[str, Any]:
    """Ours against the peer, in turns with matrix products in the same precision."""
    ours, plain = sides(arch, prototypes, device, precision, peer_precision, patch, drop_path=DROP_PATH)
    peer_student, peer_step = peer_of(plain, arch, patch, reference)
    groups = views(batch, 8, device)
    ours.set_split(Split(1, recompute))
    students = ours.method.student.eval(), peer_student.eval()  # without stochastic depth, to compare
    loss, peer = ours(groups, RATES)["loss"].item(), peer_step(groups)
    tolerance = 1e-4 if {precision, peer_precision} == {"fp32"} else 0.05
    assert abs(loss - peer) < tolerance * peer, (loss, peer)
    for student in students:
        student.train()
    with FlopCounterMode(display=False) as counter:
        ours(groups, RATES)
    if compiled:
        parallel.compile_networks(ours.method)  # pyright: ignore[reportAttributeAccessIssue]
        ours(groups, RATES)
    rates, flops = [], counter.get_total_flops()
    dtype = parallel.DTYPES.get(precision, torch.float32)
    steps = 10 if device.type == "cuda" else 1  # of a turn: a GPU works on one while the next is prepared
    turns = {
        "ours": lambda: [ours(groups, RATES) for _ in range(steps)],
        "peer": lambda: [peer_step(groups) for _ in range(steps)],
        "product": lambda: rates.append(measure_matrix_rate(device, dtype)),
    }
    took = harness.alternate(turns, pairs, device)
    took = {name: [t / steps for t in times] for name, times in took.items()}
    return {
        "peer": "the same mathematics written plainly" if reference is None else "the reference's own step",
        "arch": arch,
        "patch_size": patch,
        "views": "2 x 224 + 8 x 96",
        "batch": batch,
        "prototypes": prototypes,
        "drop_path": DROP_PATH,
        "precision": precision,
        "peer_precision": peer_precision,
        "compiled": compiled,
        "recompute": recompute,
        "ratio": harness.ratio(took["peer"], took["ours"]),
        "ours_seconds": harness.spread(took["ours"]),
        "ours_images_per_second": harness.spread([batch / t for t in took["ours"]]),
        "gflop_per_image": flops / batch / 1e9,
        "matrix_product_gflops_per_second": harness.spread([rate / 1e9 for rate in rates]),
        "share_of_matrix_product": harness.spread([flops / t / r for t, r in zip(took["ours"], rates, strict=True)]),
        "peak_bytes": {name: harness.peak_bytes(turns[name], device) for name in ("ours", "peer")},
    }


def measure_what_fits(batch: int, options: Any) -> dict[str, Any]:
    """`measure` of the largest batch, halved from `batch`, whose step and the peer's fit into memory."""
    device = torch.device(options.device)
    half = options.precision != "fp32" and device.type == "cuda"  # in which the reference ships it
    sizes = (options.arch, batch, options.prototypes, options.pairs, device)
    precisions = options.precision, "fp16" if half else "fp32"
    try:
        return measure(*sizes, *precisions, options.compile, options.patch, options.reference, options.recompute)
    except torch.OutOfMemoryError:
        if batch == 1:
            raise
    gc.collect()  # here, where the error no longer holds what was allocated
    torch.cuda.empty_cache()
    return measure_what_fits(batch // 2, options)


def main() -> None:
    parser = harness.parser(__doc__, "step")
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--batch", type=int, help="images; None: 64 on a GPU, halved until a step fits, and 8 on a CPU")
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--reference", type=Path, help="checkout of facebookresearch/dino to compare with")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--compile", action="store_true", help="ours")
    parser.add_argument("--recompute", choices=get_args(Recompute), default="nothing", help="ours")
    options = harness.parse(parser)
    figures = measure_what_fits(options.batch or (64 if options.device == "cuda" else 8), options)
    harness.write({"what": "training step, peer / ours"} | figures, options)


if __name__ == "__main__":
    harness.run(main)
