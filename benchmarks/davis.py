"""Labels carried from 8 frames to the next, side by side with a matrix of all pairs as the reference builds it.

    python benchmarks/davis.py

Grids of patches are those of DAVIS at 480 pixels; features are random, 384 wide. The peer fills a mask of all pairs of
patches in four nested loops (once a video), multiplies all similarities by it, and sorts out what is below the fifth;
ours cuts the grid into tiles. Both give the same labels, which is checked. They take turns in one process and on one
thread; peak memory is that of a process of its own. The peer's loop fills a matrix of PyTorch as the reference's does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dino.eval import propagation
from views import processor

GRIDS = {"480 x 832, patch 16": (30, 52), "480 x 832, patch 8": (60, 104)}
DIM, SOURCES, CLASSES, RADIUS, TOP_K = 384, 8, 3, 12, 5
METHODS = ("peer", "ours")


def frames(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1 + SOURCES, height, width, DIM, generator=generator)
    labels = torch.rand(SOURCES, height, width, CLASSES, generator=generator)
    return F.normalize(features[0], dim=-1), F.normalize(features[1:], dim=-1), labels


def peer_neighbourhoods(height: int, width: int) -> Tensor:
    seen = torch.zeros(height, width, height, width)
    for i in range(height):
        for j in range(width):
            for k in range(i - RADIUS, i + RADIUS + 1):
                for m in range(j - RADIUS, j + RADIUS + 1):
                    if 0 <= k < height and 0 <= m < width:
                        seen[i, j, k, m] = 1
    return seen.view(height * width, height * width)


def peer_propagate(target: Tensor, sources: Tensor, labels: Tensor, seen: Tensor) -> Tensor:
    queries, keys = target.flatten(0, 1), sources.flatten(1, 2)
    pairs = torch.exp(torch.matmul(queries, keys.transpose(1, 2)) / propagation.TEMPERATURE)
    pairs *= seen
    pairs = pairs.transpose(1, 2).reshape(-1, len(queries))  # all sources x queries
    pairs[pairs < pairs.topk(TOP_K, dim=0).values[-1]] = 0
    return ((pairs / pairs.sum(dim=0)).T @ labels.flatten(0, 2)).view(*target.shape[:2], -1)


def our_neighbourhoods(height: int, width: int) -> None:
    for _ in propagation.neighbourhoods(height, width, RADIUS):
        pass


def our_propagate(target: Tensor, sources: Tensor, labels: Tensor) -> Tensor:
    return propagation.propagate(target, sources, labels, RADIUS, TOP_K)


def timed(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def peak_kilobytes() -> int:
    """Most memory this process has held since this was last asked (Linux)."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")  # start again from what is held now
    return int(status.partition("VmHWM:")[2].split()[0])


def megabytes(method: str, height: int, width: int) -> float:
    """What one frame adds to the peak of this process, which has done nothing else; mask and all."""
    torch.set_num_threads(1)
    data = frames(height, width)
    peak_kilobytes()
    before = peak_kilobytes()
    # The mask is filled at once here, for the time's sake; it is as large.
    near = torch.ones(height * width, height * width) if method == "peer" else None
    peer_propagate(*data, near) if near is not None else our_propagate(*data)
    return (peak_kilobytes() - before) * 1024 / 1e6


def measure(height: int, width: int, num_pairs: int) -> dict:
    data = frames(height, width)
    clocks: list[dict[str, float]] = []
    for _ in range(num_pairs):
        masks: list[Tensor] = []
        clock = {"peer neighbourhoods": timed(lambda masks=masks: masks.append(peer_neighbourhoods(height, width)))}
        clock["ours neighbourhoods"] = timed(lambda: our_neighbourhoods(height, width))
        clock["peer frame"] = timed(lambda masks=masks: peer_propagate(*data, masks[0]))
        clock["ours frame"] = timed(lambda: our_propagate(*data))
        clocks.append(clock)
        torch.testing.assert_close(our_propagate(*data), peer_propagate(*data, masks[0]), rtol=1e-4, atol=1e-5)
    result: dict = {"cpu_seconds": {k: statistics.median(clock[k] for clock in clocks) for k in clocks[0]}}
    for what in ("neighbourhoods", "frame"):
        ratios = [clock[f"peer {what}"] / clock[f"ours {what}"] for clock in clocks]
        result[f"ratio, {what}"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="times that both do the same")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "davis-cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = {name: {m: pool.apply(megabytes, (m, *grid)) for m in METHODS} for name, grid in GRIDS.items()}
    grids = {name: {"peak_megabytes": peaks[name], **measure(*grid, args.pairs)} for name, grid in GRIDS.items()}
    for name, found in grids.items():
        for what in ("neighbourhoods", "frame"):
            ratio, seconds = found[f"ratio, {what}"], found["cpu_seconds"]
            spread = f"{ratio['min']:.1f} .. {ratio['max']:.1f}"
            times = f"{seconds[f'peer {what}']:.4f} s / {seconds[f'ours {what}']:.4f} s"
            print(f"{name:22}{what:16}{times:>24}  peer / ours {ratio['median']:.1f} ({spread})")
        memory = found["peak_megabytes"]
        print(f"{name:22}{'peak memory':16}{memory['peer']:>12.0f} MB / {memory['ours']:.0f} MB")
    result = {
        "what": f"labels from {SOURCES} frames to the next, radius {RADIUS}, top {TOP_K}, {DIM} features, one thread",
        "peer": "a mask of all pairs of patches filled in nested loops (once a video), and a product with all similarities",
        "device": {"cpu": processor(), "cores": os.cpu_count(), "load_average": os.getloadavg()[0]},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "pairs": args.pairs,
        "grids": grids,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
