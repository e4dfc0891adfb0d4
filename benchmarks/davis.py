"""Carrying labels to one frame: ours against the reference's way written plainly, alternating in one process.

    python benchmarks/davis.py --patch 8 --pairs 3

The peer builds an (h w) x (h w) mask of near patches in nested loops, once a video, and multiplies the whole affinity of
the frame with the first and the last 7 frames by it. Ours holds a tile of patches at a time against what is near it.
Ratios: peer time / our time; memory is what either has alive at most, counted tensor by tensor.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dino.engine.memory import peak
from dino.eval.propagation import TEMPERATURE, TILE, _near, _reach, propagate

RADIUS, TOPK, SOURCES = 12, 5, 8


def plain_mask(height: int, width: int) -> Tensor:
    mask = torch.zeros(height, width, height, width)
    for i in range(height):
        for j in range(width):
            for p in range(i - RADIUS, i + RADIUS + 1):
                for q in range(j - RADIUS, j + RADIUS + 1):
                    if 0 <= p < height and 0 <= q < width:
                        mask[i, j, p, q] = 1
    return mask.reshape(height * width, height * width)


def our_neighbourhood(height: int, width: int) -> None:
    for i in range(0, height, TILE):
        for j in range(0, width, TILE):
            for start, edge in ((i, height), (j, width)):
                _near(*_reach(start, edge, RADIUS), RADIUS, torch.empty(0))


def plain_propagate(target: Tensor, sources: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Features [h w, d] and [m, h w, d], labels [m, h w, c]."""
    affinity = (target @ sources.transpose(1, 2) / TEMPERATURE).exp() * mask  # [m, h w, h w]
    affinity = affinity.transpose(0, 1).flatten(1)
    least = affinity.topk(TOPK, dim=1).values[:, -1:]
    affinity[affinity < least] = 0
    return (affinity / affinity.sum(dim=1, keepdim=True)) @ labels.flatten(0, 1)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: PyTorch's choice")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    h, w = 480 // options.patch, 832 // options.patch
    torch.manual_seed(0)
    frames = F.normalize(torch.randn(SOURCES, h, w, options.dim), dim=-1)
    target = F.normalize(frames[-1] + 0.05 * torch.randn(h, w, options.dim), dim=-1)
    labels = torch.rand(SOURCES, h, w, 3).softmax(dim=-1)
    ours_in = (target, frames.permute(1, 2, 0, 3).contiguous(), labels.permute(1, 2, 0, 3).contiguous())
    plain_in = (target.flatten(0, 1), frames.flatten(1, 2), labels.flatten(1, 2))
    mask = plain_mask(h, w)
    build, carry = [], []
    for _ in range(options.pairs):
        build.append((seconds(lambda: our_neighbourhood(h, w)), seconds(lambda: plain_mask(h, w))))
        carry.append(
            (seconds(lambda: propagate(*ours_in, RADIUS, TOPK)), seconds(lambda: plain_propagate(*plain_in, mask)))
        )
    difference = (propagate(*ours_in, RADIUS, TOPK).flatten(0, 1) - plain_propagate(*plain_in, mask)).abs().max().item()
    assert difference < 1e-4, difference
    memory = [peak(lambda: propagate(*ours_in, RADIUS, TOPK)), peak(lambda: plain_propagate(*plain_in, mask))]
    ratios = [b / a for a, b in carry]
    result = {
        "what": "label propagation, plain / ours",
        "peer": "the reference's way written plainly",
        "patches": [h, w],
        "sources": SOURCES,
        "device": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "neighbourhood_ours_seconds": statistics.median(a for a, _ in build),
        "neighbourhood_plain_seconds": statistics.median(b for _, b in build),
        "neighbourhood_ratio": statistics.median(b / a for a, b in build),
        "frame_ours_seconds": statistics.median(a for a, _ in carry),
        "frame_plain_seconds": statistics.median(b for _, b in carry),
        "frame_ratio_median": statistics.median(ratios),
        "frame_ratio_min": min(ratios),
        "frame_ratio_max": max(ratios),
        "memory_ours_mb": memory[0] / 1e6,
        "memory_plain_mb": (memory[1] + mask.numel() * 4) / 1e6,
        "largest_difference": difference,
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
