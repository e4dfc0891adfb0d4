"""An index of many images: how long it takes to open, and the memory of a data worker that goes through an epoch of it.

    python benchmarks/scale.py FOLDER [--images 100000000] [--per-shard 10000]

FOLDER gets the files of an index, about 48 bytes an image, as `dino.data.index` writes them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path

import numpy as np

from dino.data import order
from dino.data.index import Index, Shard
from dino.data.reader import Reader
from dino.data.shards import Shards
from dino.data.sources import hold_out

CHUNK = 10**6


def write_index(folder: Path, images: int, per_shard: int) -> None:
    """As for shards of images of about 100 kB, with names of 15 characters and 1,000 classes."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.int64, (images + (name == "starts"),))
        for name in ("offsets", "lengths", "labels", "starts")
    }
    with (folder / "names").open("wb") as names:
        for first in range(0, images, CHUNK):
            positions = np.arange(first, min(first + CHUNK, images))
            rows = slice(first, first + len(positions))
            columns["offsets"][rows], columns["lengths"][rows] = positions % per_shard * 100_000, 99_000
            columns["labels"][rows], columns["starts"][rows] = positions % 1000, positions * 16
            digits = positions[:, None] // 10 ** np.arange(14, -1, -1) % 10 + ord("0")
            names.write(np.pad(digits.astype(np.uint8), ((0, 0), (0, 1))).tobytes())
    columns["starts"][images] = images * 16
    np.save(folder / "bounds.npy", np.append(np.arange(0, images, per_shard), images))
    about = {"classes": [str(i) for i in range(1000)], "fingerprint": "0"}
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def own_memory() -> tuple[float, float]:
    """Megabytes of this process: memory that it has written to, and pages of files, which the system may take back."""
    found = {
        line.split()[0]: int(line.split()[1]) / 1024
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    }
    return found["Anonymous:"], found["Private_Clean:"] + found["Private_Dirty:"] - found["Anonymous:"]


def visit(source: Shards, queue: multiprocessing.Queue[tuple[float, float, float]]) -> None:
    """What a worker does but read: the positions of every 100th step of an epoch, with names and places."""
    (before, _), started, visits = own_memory(), time.perf_counter(), order.Order(source, 0)
    steps = range(0, len(source) // 256, 100)
    count = 0
    for count, step in enumerate(steps):
        positions, _ = visits.visit(0, step * 256, (step + 1) * 256)
        for position in positions[:8].tolist():
            source.name(position)
        if count == 2000:
            break
    after, mapped = own_memory()
    queue.put((after - before, mapped, (time.perf_counter() - started) / (count + 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=10**8)
    parser.add_argument("--per-shard", type=int, default=10**4)
    options = parser.parse_args()
    folder = options.folder / f"index-{options.images}-{options.per_shard}"
    if not (folder / "about.json").is_file():
        write_index(folder, options.images, options.per_shard)
    number = -(-options.images // options.per_shard)
    shards = [Shard(f"/shards/{i:06d}.tar", f"{i:06d}.tar", "1") for i in range(number)]
    started = time.perf_counter()
    index = Index(folder, shards)
    train, _ = hold_out(Shards(index, Reader(), labeled=True), 0.1, 1000, 0)
    train.name(len(train) - 1)
    print(f"{options.images:,} images in {number:,} shards: opened in {time.perf_counter() - started:.2f} s")
    queue: multiprocessing.Queue[tuple[float, float, float]] = multiprocessing.Queue()
    worker = multiprocessing.Process(target=visit, args=(train, queue))
    worker.start()
    grown, mapped, seconds = queue.get()
    worker.join()
    print(
        f"a worker grew by {grown:.0f} MB, and sees {mapped:.0f} MB of the files; {1000 * seconds:.1f} ms a batch of 256"
    )


if __name__ == "__main__":
    main()
