"""An embedding of many images on the disk: its index, queries of it against an exact search, and a selection from it.

    python benchmarks/large_search.py FOLDER --rows 1000000 [--threads 2]

FOLDER gets shards as `dino embed --fp16` writes them, 0.8 kB an image, and the index beside them; delete both afterwards.
Features are drawn about 1,000 centers, the i-th of which has a share of 1/i; every hundredth is a near-copy of the last.
Memory is what the process has written to itself, without pages of files, which the system may take back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import harness
from dino.features.embedding import Folder, Mapped
from dino.features.ivfpq import AT_ONCE, MEASURED, Ivfpq, find_exactly
from dino.features.select import select
from dino.features.shards import list_shards, write_shard

SPREAD, SHARD, CENTERS = 1.0, 2**14, 1000  # noise about a center of length 1; rows of a shard
COPIED, NOISE = 100, 0.1  # every hundredth is a copy, with that much noise


class Draw:
    def __init__(self, dim: int):
        self.dim, self.generator = dim, torch.Generator().manual_seed(0)
        self.centers = F.normalize(torch.randn(CENTERS, dim, generator=self.generator), dim=1)

    def rows(self, count: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shares = 1 / torch.arange(1, CENTERS + 1)
        which = torch.multinomial(shares, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.dim, generator=generator) * self.dim**-0.5
        values = F.normalize(self.centers[which] + SPREAD * noise, dim=1)
        copies = torch.arange(COPIED - 1, count, COPIED)
        values[copies] = values[copies - 1] + NOISE * noise[copies]
        return F.normalize(values, dim=1)


def write(folder: Path, rows: int, draw: Draw) -> None:
    """The shards that are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ("model", "model_sha256", "data", "data_sha256", "stamp")
    about: dict[str, Any] = dict.fromkeys(words, "") | {"pooling": "cls", "fp16": True, "bad": [], "size": 224}
    about |= {"images": rows, "shard": SHARD, "shards": -(-rows // SHARD)}
    there = list_shards(str(folder))[0]
    for number in range(about["shards"]):
        if number not in there:
            positions = np.arange(number * SHARD, min(rows, (number + 1) * SHARD))
            names = np.array([f"{i // 10_000:06d}/{i:09d}.jpg" for i in positions.tolist()], object)
            features = draw.rows(len(positions), number + 1).half().numpy()
            write_shard(f"{folder}/part-{number:06d}.parquet", {"path": names, "index": positions}, features, about)


def own_megabytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


@contextmanager
def measured(what: str, result: dict[str, Any]) -> Iterator[None]:
    """Seconds of the block, of all processors' work, and megabytes that it needed beyond what there was."""
    before, most, done = own_megabytes(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            most[0] = max(most[0], own_megabytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started, worked = time.perf_counter(), time.process_time()
    yield
    result[what] = {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - worked}
    done.set()
    watcher.join()
    result[what]["megabytes"] = max(most[0], own_megabytes()) - before
    print(what, result[what], flush=True)


def main() -> None:
    parser = harness.parser(__doc__, "large-search")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=10**6)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--keep", type=int, default=100_000)
    options = harness.parse(parser)
    options.json = options.json.with_stem(f"{options.json.stem}-rows-{options.rows}")
    faiss.omp_set_num_threads(torch.get_num_threads())
    result: dict[str, Any] = {"rows": options.rows, "dim": options.dim, "faiss": faiss.__version__}
    result["threads"] = torch.get_num_threads()
    place, draw = options.folder / f"{options.rows}.parquet", Draw(options.dim)
    write(place, options.rows, draw)
    with measured("open", result):
        rows = Mapped(Folder.open(place))
    with measured("build", result):
        index = Ivfpq(rows, rebuild=True)
    result["index_megabytes"], result["recall"] = index.path.stat().st_size / 1e6, index.recall
    result["refined"] = index.about["refined"]
    with measured("open index", result):
        index = Ivfpq(rows)
    queries = draw.rows(AT_ONCE, 0)  # which are no rows
    with measured("exact search of 100", result):
        exact = find_exactly(rows, queries, MEASURED)[1]
    with measured("search of 100", result):
        found = index.find_nearest(queries, MEASURED)[1]
    result["recall_of_new"] = (exact[:, :, None] == found[:, None]).any(dim=2).float().mean().item()
    times = []
    for query in queries[:, None]:
        started = time.perf_counter()
        index.find_nearest(query, MEASURED)
        times.append(1000 * (time.perf_counter() - started))
    result["milliseconds"] = harness.spread(times)
    with measured("select", result):
        kept = select(rows, options.keep, threshold=0.95)
    share = kept.all_counts.argmax()
    result["selected"] = {
        "kept": len(kept.rows),
        "copies": kept.copies,
        "copies_planted": sum(len(range(COPIED - 1, len(piece), COPIED)) for piece in rows.pieces),
        "groups": len(kept.all_counts),
        "largest_group": kept.all_counts[share] / options.rows,
        "of_those_kept": kept.kept_counts[share] / len(kept.rows),
    }
    harness.write(result, options)


if __name__ == "__main__":
    harness.run(main)
