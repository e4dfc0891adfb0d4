"""How fast images are read: from a folder of files, from tar files in the order of a training, and by WebDataset in theirs.

    python benchmarks/reading.py FOLDER [--images 4000] [--pairs 5]

FOLDER gets drawn photographs (80 kB each), as files and in tar files of 500. Before each turn the system's cache forgets
them. The second part makes batches of views, from tar files on the disk and from an object store whose every answer takes
20 ms more; it runs in a process of its own on this machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import tarfile
from pathlib import Path
from typing import Any

import webdataset
from aiohttp import web

import harness
import views
from dino.data.loader import ViewBatches, announce, iterate
from dino.data.open import open_images
from dino.data.order import Order
from dino.data.render import CpuRenderer
from dino.data.sources import Source, read_bytes
from render import draw_pictures, encoded

BATCH, PER_SHARD, DRAWN = 64, 500, 100


def write_images(folder: Path, count: int) -> None:
    if (folder / "complete").exists():
        return
    contents = [encoded(image) for image in draw_pictures(DRAWN)]
    for name in ("files", "tars"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for first in range(0, count, PER_SHARD):
        with tarfile.open(folder / "tars" / f"{first:06d}.tar", "w") as tar:
            for i in range(first, min(first + PER_SHARD, count)):
                path = folder / "files" / f"{i // 1000:03d}" / f"{i:06d}.jpg"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(contents[i % DRAWN])
                tar.add(path, path.name)
    os.sync()
    (folder / "complete").touch()


def forget(folder: Path) -> None:
    """Empty the system's cache: for root of everything, names of files included; else of what is in this folder's files."""
    os.sync()
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return
    for path in folder.rglob("*.*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_in_order(source: Source) -> int:
    """The bytes of an epoch, in the order of a training, as a data worker asks for them."""
    order, size = Order(source, 0), 0

    def find(step: int) -> list[int]:
        return order.visit(0, step * BATCH, min((step + 1) * BATCH, len(source)))[0].tolist()

    for step in range(len(source) // BATCH):
        if step + 1 < len(source) // BATCH:
            announce(source, find, step)
        size += sum(len(read_bytes(source, i) or b"") for i in find(step))
    return size


def read_as_webdataset(tars: Path) -> int:
    shards = [str(path) for path in sorted(tars.glob("*.tar"))]
    dataset: Any = webdataset.WebDataset(shards, shardshuffle=False)  # pyright: ignore
    return sum(len(sample["jpg"]) for sample in dataset)


def make_batches(source: Source, steps: int) -> None:
    batches = ViewBatches(source, views.OPTIONS, CpuRenderer(), BATCH, 0)
    for _ in iterate(batches, 0, steps, 1, pin_memory=False):
        pass


LATENCY = 0.02  # seconds
# The part of S3's protocol that listing and reading need; moto's server, which tests use, reads a whole file for each part.
LISTING = "<ListBucketResult><Name>tars</Name><IsTruncated>false</IsTruncated>{}</ListBucketResult>"
ENTRY = "<Contents><Key>{}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>1</ETag><Size>{}</Size></Contents>"


def serve(folder: Path, port: multiprocessing.Queue[int]) -> None:
    """Serve the files of a folder as the bucket "tars"; every answer takes `LATENCY` more."""

    async def answer(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(LATENCY)
        path = folder / request.match_info.get("key", "")
        if path.is_file():
            return web.FileResponse(path, headers={"ETag": '"1"'})
        if "list-type" not in request.query:
            return web.Response(status=404)
        prefix = request.query.get("prefix", "")
        found = [
            ENTRY.format(p.name, p.stat().st_size) for p in sorted(folder.glob("*.tar")) if p.name.startswith(prefix)
        ]
        return web.Response(text=LISTING.format("".join(found)), content_type="application/xml")

    async def start() -> None:
        app = web.Application()
        app.router.add_get("/{bucket}", answer)
        app.router.add_get("/{bucket}/{key:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port.put(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(start())


def main() -> None:
    made = harness.parser(__doc__, "reading")
    made.add_argument("folder", type=Path)
    made.add_argument("--images", type=int, default=4000)
    made.add_argument("--steps", type=int, default=60, help="batches of views of each turn")
    options = harness.parse(made)
    folder: Path = options.folder / str(options.images)
    write_images(folder, options.images)
    files, tars = (open_images(folder / name) for name in ("files", "tars"))
    took: dict[str, list[float]] = {"files": [], "tars": [], "WebDataset": []}
    turns = {
        "files": lambda: read_in_order(files),
        "tars": lambda: read_in_order(tars),
        "WebDataset": lambda: read_as_webdataset(folder / "tars"),
    }
    for pair in range(options.pairs):
        for name in [*turns][:: -1 if pair % 2 else 1]:
            forget(folder)
            took[name] += harness.alternate({name: turns[name]}, 1)[name]
    result = {f"tars to {name}": harness.ratio(took[name], took["tars"]) for name in ("files", "WebDataset")}

    port: multiprocessing.Queue[int] = multiprocessing.Queue()
    server = multiprocessing.Process(target=serve, args=(folder / "tars", port), daemon=True)
    server.start()
    keys = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= keys | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port.get()}", "DINO_CACHE": str(folder / "cache")}
    remote = open_images("s3://tars")
    both = {"disk": lambda: make_batches(tars, options.steps), "store": lambda: make_batches(remote, options.steps)}
    batches = harness.alternate(both, options.pairs)
    server.kill()
    result |= {"store to disk, views": harness.ratio(batches["disk"], batches["store"])}
    seen = {f"{name}, images/s": [options.images / t for t in times] for name, times in took.items()}
    seen |= {
        f"views from {name}, images/s": [BATCH * options.steps / t for t in times] for name, times in batches.items()
    }
    harness.write({"ratios": result, "rates": {name: harness.spread(values) for name, values in seen.items()}}, options)


if __name__ == "__main__":
    harness.run(main)
