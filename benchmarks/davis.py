"""Carrying labels to one frame: ours against the reference's way written plainly, alternating in one process.

    python benchmarks/davis.py --patch 8 --pairs 3

The peer builds an (h w) x (h w) mask of near patches in nested loops, once a video, and multiplies the whole affinity of
the frame with the first and the last 7 frames by it. Ours holds a tile of patches at a time against what is near it.
Ratios: peer time / our time; memory is what either has alive at most, counted tensor by tensor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import harness
from dino.bench import measure_matrix_rate
from dino.engine.fit import measure_peak
from dino.eval.propagation import TEMPERATURE, find_neighborhoods, propagate

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


def our_neighborhood(height: int, width: int) -> None:
    for _ in find_neighborhoods(height, width, RADIUS):
        pass


def plain_propagate(target: Tensor, sources: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Features [h w, d] and [m, h w, d], labels [m, h w, c]."""
    affinity = (target @ sources.transpose(1, 2) / TEMPERATURE).exp() * mask  # [m, h w, h w]
    affinity = affinity.transpose(0, 1).flatten(1)
    least = affinity.topk(TOPK, dim=1).values[:, -1:]
    affinity[affinity < least] = 0
    return (affinity / affinity.sum(dim=1, keepdim=True)) @ labels.flatten(0, 1)


def main() -> None:
    parser = harness.parser(__doc__, "davis")
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--dim", type=int, default=384)
    options = harness.parse(parser)
    h, w = 480 // options.patch, 832 // options.patch
    torch.manual_seed(0)
    frames = F.normalize(torch.randn(SOURCES, h, w, options.dim), dim=-1)
    target = F.normalize(frames[-1] + 0.05 * torch.randn(h, w, options.dim), dim=-1)
    labels = torch.rand(SOURCES, h, w, 3).softmax(dim=-1)
    ours_in = (target, frames, labels)
    plain_in = (target.flatten(0, 1), frames.flatten(1, 2), labels.flatten(1, 2))
    mask = plain_mask(h, w)
    turns = {
        "neighborhood, ours": lambda: our_neighborhood(h, w),
        "neighborhood, plain": lambda: plain_mask(h, w),
        "frame, ours": lambda: propagate(*ours_in, RADIUS, TOPK),
        "frame, plain": lambda: plain_propagate(*plain_in, mask),
        "product": lambda: rates.append(measure_matrix_rate(torch.device("cpu"))),
    }
    rates: list[float] = []
    with FlopCounterMode(display=False) as counter:
        turns["frame, ours"]()
    took = harness.alternate(turns, options.pairs)
    difference = (propagate(*ours_in, RADIUS, TOPK).flatten(0, 1) - plain_propagate(*plain_in, mask)).abs().max().item()
    assert difference < 1e-4, difference
    memory = [measure_peak(turns["frame, ours"]), measure_peak(turns["frame, plain"])]
    result = {
        "what": "label propagation, plain / ours",
        "peer": "the reference's way written plainly",
        "patches": [h, w],
        "sources": SOURCES,
        "seconds": {name: harness.spread(times) for name, times in took.items()},
        "neighborhood_ratio": harness.ratio(took["neighborhood, plain"], took["neighborhood, ours"]),
        "frame_ratio": harness.ratio(took["frame, plain"], took["frame, ours"]),
        "gflop_of_a_frame": counter.get_total_flops() / 1e9,
        "share_of_matrix_product": harness.spread(
            [counter.get_total_flops() / t / rate for t, rate in zip(took["frame, ours"], rates, strict=True)]
        ),
        "bytes_ours": memory[0],
        "bytes_plain": memory[1] + mask.numel() * 4,
        "largest_difference": difference,
    }
    harness.write(result, options)


if __name__ == "__main__":
    harness.run(main)
