"""k-NN classification as a share of the machine's matrix-product rate, alternating in one process.

    python benchmarks/knn.py --bank 200000 --queries 4000

Each turn times a 4096 x 4096 product of float32 (the rate), then the whole of `classify` at k = 10, 20, 100 and 200:
normalizing, similarities, the nearest, votes. Its arithmetic is counted as the similarities alone. The peer does the same
with a plain product and topk, as the reference does chunk by chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import harness
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


def main() -> None:
    parser = harness.parser(__doc__, "knn")
    parser.add_argument("--bank", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=4000)
    parser.add_argument("--dim", type=int, default=384)
    options = harness.parse(parser)
    torch.manual_seed(0)
    bank, queries = torch.randn(options.bank, options.dim), torch.randn(options.queries, options.dim)
    labels, truth = torch.randint(CLASSES, (options.bank,)), torch.randint(CLASSES, (options.queries,))
    square, flops = torch.randn(EDGE, EDGE), 2 * options.bank * options.queries * options.dim
    given = (bank, labels, queries, truth)
    assert abs(knn.classify(*given)["knn20_top1"] - plain(*given)["knn20_top1"]) < 0.2
    turns = {
        "product before": lambda: square @ square,
        "ours": lambda: knn.classify(*given),
        "product after": lambda: square @ square,
        "plain": lambda: plain(*given),
    }
    took = harness.alternate(turns, options.pairs)
    rates = [4 * EDGE**3 / (a + b) for a, b in zip(took["product before"], took["product after"], strict=True)]
    result = {
        "what": "k-NN classification: share of the matrix-product rate; plain / ours",
        "peer": "the reference's way written plainly, k = 20 only (ours: 10, 20, 100, 200)",
        "bank": options.bank,
        "queries": options.queries,
        "dim": options.dim,
        "matrix_product_gflops_per_second": harness.spread([rate / 1e9 for rate in rates]),
        "share_of_matrix_product": harness.spread([flops / t / r for t, r in zip(took["ours"], rates, strict=True)]),
        "ratio": harness.ratio(took["plain"], took["ours"]),
    }
    harness.write(result, options)


if __name__ == "__main__":
    harness.run(main)
