"""Search in a million features: time of a query and recall of the approximate indices against the exact one.

    OMP_NUM_THREADS=4 python benchmarks/search.py --rows 1000000 --json benchmarks/results/search-cpu.json

Features are drawn about centres, as those of images lie in clusters; queries are other draws about the same centres. A turn
asks for the ten nearest of one query with each index, one after the other, and so does FAISS's own flat index.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import torch
import torch.nn.functional as F

from dino.inference.embed import Embedding, Folder
from dino.inference.search import Index

K, SPREAD = 10, 1.0  # neighbours; noise about a centre of length 1


def milliseconds(work: Callable[..., object], *arguments: object) -> float:
    started = time.perf_counter()
    work(*arguments)
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--kinds", nargs="*", default=["ivf", "hnsw"])
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(1000, options.dim), dim=1)

    def draw(count: int) -> torch.Tensor:
        noise = SPREAD * options.dim**-0.5 * torch.randn(count, options.dim)
        return F.normalize(noise.add_(centres[torch.randint(len(centres), (count,))]), dim=1)

    values, queries = draw(options.rows), draw(options.rounds)
    result = {
        "what": f"milliseconds of a query of one image for its {K} nearest, median and range; recall of them",
        "rows": options.rows,
        "dim": options.dim,
        "device": f"{platform.processor() or platform.machine()}, {options.threads} threads",
        "torch": torch.__version__,
        "faiss": faiss.__version__,
    }
    peer = faiss.IndexFlatIP(options.dim)
    peer.add(values.numpy())
    with tempfile.TemporaryDirectory() as place:
        folder = Folder(Path(place, "x.parquet"), [], {}, options.rows, options.dim, [])
        embedding = Embedding(folder, [], torch.arange(0).numpy(), values)
        indices = {"flat": Index(embedding)}
        for kind in options.kinds:
            started = time.perf_counter()
            indices[kind] = Index(embedding, kind)
            result[f"{kind}_seconds_to_build"] = time.perf_counter() - started
    indices["flat"].nearest(queries[:1], K)  # makes its rows of half precision
    times: dict[str, list[float]] = {"faiss_flat": [], **{kind: [] for kind in indices}}
    for query in queries[:, None]:
        times["faiss_flat"].append(milliseconds(peer.search, query.numpy(), K))
        for kind, index in indices.items():
            times[kind].append(milliseconds(index.nearest, query, K))
    for kind, spent in times.items():
        result[f"{kind}_ms_median"], result[f"{kind}_ms_min"] = statistics.median(spent), min(spent)
        result[f"{kind}_ms_max"] = max(spent)
    exact = indices["flat"].nearest(queries, K)[1]
    for kind in options.kinds:
        found = indices[kind].nearest(queries, K)[1]
        result[f"{kind}_recall"] = (exact[:, :, None] == found[:, None]).any(dim=2).float().mean().item()
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
