"""k-NN classification as a share of the machine's matrix-product rate, alternating in one process.

    python benchmarks/knn.py --bank 200000 --queries 4000

Each turn times a 4096 x 4096 product of float32 (the rate), then the whole of `classify` at k = 10, 20, 100 and 200:
normalising, similarities, the nearest, votes. Its arithmetic is counted as the similarities alone. The peer does the same
with a plain product and topk, as the reference does chunk by chunk.
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

from dino.eval import knn

CLASSES, EDGE = 1000, 4096


def plain(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor) -> dict[str, float]:
    """The reference's loop: a hundred chunks of queries, all similarities, topk, votes over one-hot labels."""
    bank, queries = F.normalize(bank, dim=1).T.contiguous(), F.normalize(queries, dim=1)
    right, chunk = 0, max(1, len(queries) // 100)
    for start in range(0, len(queries), chunk):
        similarity, nearest = (queries[start : start + chunk] @ bank).topk(20, dim=1)
        hot = F.one_hot(bank_labels[nearest], CLASSES).float()
        votes = (hot * (similarity / 0.07).exp()[..., None]).sum(dim=1)
        right += int((votes.sort(dim=1, descending=True).indices[:, 0] == labels[start : start + chunk]).sum())
    return {"knn20_top1": 100 * right / len(queries)}


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=4000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: PyTorch's choice")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    bank, queries = torch.randn(options.bank, options.dim), torch.randn(options.queries, options.dim)
    labels, truth = torch.randint(CLASSES, (options.bank,)), torch.randint(CLASSES, (options.queries,))
    square, flops = torch.randn(EDGE, EDGE), 2 * options.bank * options.queries * options.dim
    assert (
        abs(
            knn.classify(bank, labels, queries, truth)["knn20_top1"] - plain(bank, labels, queries, truth)["knn20_top1"]
        )
        < 0.2
    )
    rates, shares, ratios = [], [], []
    for _ in range(options.rounds):
        before = seconds(lambda: square @ square)
        ours = seconds(lambda: knn.classify(bank, labels, queries, truth))
        after = seconds(lambda: square @ square)
        peer = seconds(lambda: plain(bank, labels, queries, truth))
        rates.append(2 * EDGE**3 / statistics.mean((before, after)))
        shares.append(flops / ours / rates[-1])
        ratios.append(peer / ours)
    result = {
        "what": "k-NN classification: share of the matrix-product rate; plain / ours",
        "peer": "the reference's way written plainly, k = 20 only (ours: 10, 20, 100, 200)",
        "bank": options.bank,
        "queries": options.queries,
        "dim": options.dim,
        "device": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "matrix_product_gflops_per_second": statistics.median(rates) / 1e9,
        "share_of_rate_median": statistics.median(shares),
        "share_of_rate_min": min(shares),
        "share_of_rate_max": max(shares),
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
