"""One full training step (teacher, student, loss, backward, clipping, AdamW, EMA): ours against the same mathematics
written plainly, alternating in one process.

    python benchmarks/step.py --arch vit_small --batch 8 --pairs 5

The peer computes explicit softmax attention in every block, one log-softmax per pair of views, and loops over
parameters for clipping, AdamW and the teacher, as the reference does. Ratios first: peer time / our time.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dino.config import OptimOptions
from dino.engine import optim
from dino.method import DINO, Network
from dino.models import Head, create
from dino.models.vit import Attention, Block, VisionTransformer


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

    def forward(self, x: Tensor, only_cls: bool = False) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def plain_copy(method: DINO) -> DINO:
    plain = copy.deepcopy(method)
    for network in (plain.student, plain.teacher):
        assert isinstance(network.backbone, VisionTransformer)
        plain_blocks = [PlainBlock(block) for block in network.backbone.blocks if isinstance(block, Block)]
        network.backbone.blocks = nn.ModuleList(plain_blocks)
    return plain


def our_step(method: DINO, optimizer: torch.optim.Optimizer, groups: list[Tensor]) -> float:
    result = method(groups, 0.04)
    optimizer.zero_grad(set_to_none=True)
    result.loss.backward()
    optim.clip_per_parameter_(method.student.parameters(), 3.0)
    optimizer.step()
    method.update_teacher(0.996)
    return result.loss.item()


def plain_step(method: DINO, optimizer: torch.optim.Optimizer, groups: list[Tensor]) -> float:
    with torch.no_grad():
        teacher = method.teacher(groups[:1])
    student = (method.student(groups) / 0.1).chunk(sum(len(g) for g in groups) // (len(groups[0]) // 2))
    targets = ((teacher - method.centre.value) / 0.04).softmax(dim=-1).chunk(2)
    terms = [
        -(q * F.log_softmax(s, dim=-1)).sum(dim=-1).mean()
        for i, q in enumerate(targets)
        for v, s in enumerate(student)
        if v != i
    ]
    loss = torch.stack(terms).mean()
    method.centre.value.mul_(0.9).add_(0.1 * teacher.mean(dim=0))
    optimizer.zero_grad()
    loss.backward()
    for p in method.student.parameters():
        if p.grad is not None:
            coefficient = 3.0 / (p.grad.norm() + 1e-6)
            if coefficient < 1:
                p.grad.mul_(coefficient)
    optimizer.step()
    with torch.no_grad():
        for t, s in zip(method.teacher.parameters(), method.student.parameters(), strict=True):
            t.mul_(0.996).add_((1 - 0.996) * s)
    return loss.item()


def build(arch: str, prototypes: int) -> DINO:
    torch.manual_seed(0)
    student, teacher = (Network(b, Head(b.embed_dim, prototypes)) for b in (create(arch), create(arch)))
    return DINO(student, teacher)


def timed(step: Callable[..., float], *arguments: object) -> float:
    started = time.perf_counter()
    step(*arguments)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: PyTorch's choice")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    ours = build(options.arch, options.prototypes)
    plain = plain_copy(ours)
    groups = [torch.randn(2 * options.batch, 3, 224, 224), torch.randn(8 * options.batch, 3, 96, 96)]
    our_optimizer = optim.create(OptimOptions(), ours.student)
    plain_optimizer = torch.optim.AdamW(optim.parameter_groups(plain.student), lr=0.0, weight_decay=0.04)
    for optimizer in (our_optimizer, plain_optimizer):
        optim.set_rates(optimizer, 1e-4, 0.04)
    losses = our_step(ours, our_optimizer, groups), plain_step(plain, plain_optimizer, groups)  # warm-up, and a check
    assert abs(losses[0] - losses[1]) < 1e-4 * losses[1], losses
    with FlopCounterMode(display=False) as counter:
        our_step(ours, our_optimizer, groups)
    flops = counter.get_total_flops()
    pairs = []
    for _ in range(options.pairs):
        pairs.append((timed(our_step, ours, our_optimizer, groups), timed(plain_step, plain, plain_optimizer, groups)))
        print(f"ours {pairs[-1][0]:.3f} s   plain {pairs[-1][1]:.3f} s   ratio {pairs[-1][1] / pairs[-1][0]:.3f}")
    ratios = [b / a for a, b in pairs]
    mine = statistics.median(a for a, _ in pairs)
    result = {
        "what": "training step, plain / ours",
        "arch": options.arch,
        "batch": options.batch,
        "prototypes": options.prototypes,
        "device": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "ours_seconds": mine,
        "ours_images_per_second": options.batch / mine,
        "ours_gflops_per_second": flops / mine / 1e9,
        "gflop_per_image": flops / options.batch / 1e9,
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
