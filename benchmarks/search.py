"""Exact search in a million features in memory: time of a query. `large_search.py` measures more images, and the index.

    python benchmarks/search.py --threads 4

Features are drawn about centers, as those of images lie in clusters; queries are other draws about the same centers. A turn
asks for the ten nearest of one query, and so does FAISS's own flat index. Ours reads every row in half precision: as a share
of what reading memory reaches, timed in each turn by a sum.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import torch
import torch.nn.functional as F

import harness
from dino.features.embedding import Embedding, Folder
from dino.features.search import Index

K, SPREAD = 10, 1.0  # neighbors; noise about a center of length 1


def milliseconds(work: Callable[..., object], *arguments: object) -> float:
    started = time.perf_counter()
    work(*arguments)
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    parser = harness.parser(__doc__, "search")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.set_defaults(pairs=30)
    options = harness.parse(parser)
    faiss.omp_set_num_threads(torch.get_num_threads())
    torch.manual_seed(0)
    centers = F.normalize(torch.randn(1000, options.dim), dim=1)

    def draw(count: int) -> torch.Tensor:
        noise = SPREAD * options.dim**-0.5 * torch.randn(count, options.dim)
        return F.normalize(noise.add_(centers[torch.randint(len(centers), (count,))]), dim=1)

    values, queries = draw(options.rows), draw(options.pairs)
    result: dict[str, Any] = {
        "what": f"milliseconds of a query of one image for its {K} nearest",
        "peer": "FAISS's IndexFlatIP",
        "rows": options.rows,
        "dim": options.dim,
        "faiss": faiss.__version__,
    }
    peer = faiss.IndexFlatIP(options.dim)
    peer.add(values.numpy())
    folder = Folder(Path("x.parquet"), [], {}, options.rows, options.dim, [])
    index = Index(Embedding(folder, [], torch.arange(0).numpy(), values))
    index.find_nearest(queries[:1], K)  # makes its rows of half precision
    times: dict[str, list[float]] = {"peer": [], "flat": []}
    reading: list[float] = []
    for query in queries[:, None]:
        reading.append(milliseconds(values.sum))
        times["peer"].append(milliseconds(peer.search, query.numpy(), K))
        times["flat"].append(milliseconds(index.find_nearest, query, K))
    result["ratio"] = harness.ratio(times["peer"], times["flat"])
    result["memory_gigabytes_per_second"] = harness.spread([values.nbytes / t / 1e6 for t in reading])
    read = values.nbytes / 2  # of the rows in half precision
    shares = [(read / t) / (values.nbytes / r) for t, r in zip(times["flat"], reading, strict=True)]
    result["share_of_memory_rate"] = harness.spread(shares)
    result["milliseconds"] = {kind: harness.spread(spent) for kind, spent in times.items()}
    harness.write(result, options)


if __name__ == "__main__":
    harness.run(main)
