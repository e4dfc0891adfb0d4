"""An approximate index of many features (IVF-PQ, Jégou et al. 2011), by FAISS, kept in a file beside the embedding.

A row is its cell and a code of its difference from the cell's center. A query looks into the nearest cells; the rows whose
codes are nearest are compared exactly, by the features themselves.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino import errors, files
from dino.data.sources import evenly_spaced
from dino.features.cluster import SAMPLED, count_cells, find_centers
from dino.features.embedding import Rows
from dino.features.neighbors import find_neighbors
from dino.terminal import say, track

FEWEST = 32  # rows of an index
CODED = 2**14  # rows that the codes are made from, 64 for each of 256 centers
REFINED = (1024, 4096, 16384)  # rows that are compared exactly for a query, at least 4 for each neighbor asked for:
ENOUGH = 0.95  # the fewest with which recall is as good as this
BLOCK = 2**17  # rows
AT_ONCE = 100  # queries that recall is measured with
COMPARED = 2**17  # rows that are compared exactly at a time: 200 MB where features have 384 numbers
MEASURED = 10  # neighbors that recall is measured of
SAVED = 600  # seconds between two saves of an index that is being built
ABOUT = 512  # bytes at the end of the file, JSON: of which embedding it is, what it holds, and a digest


class Ivfpq:
    """Finds most of the nearest rows. Builds the index, or goes on building it, where it is not whole.

    Raises:
        ValueError: FAISS is missing, or the file is older than the embedding or damaged.
    """

    def __init__(self, rows: Rows, rebuild: bool = False):
        self.faiss = errors.import_optional("faiss", "--index ivfpq needs FAISS", "search")
        self.rows, self.path = rows, rows.folder.path.with_suffix(".ivfpq.faiss")
        self.about: dict[str, Any] = {"embedding": rows.folder.digest, "refined": REFINED[0], "recall": None}
        if self.path.exists() and not rebuild:
            self._read()
        else:
            files.check_writable(self.path, ".faiss", option="--index")
            self.index = self._train()
        if self.about["recall"] is None:
            self._add()
            self._measure()
            self._save()

    @property
    def recall(self) -> float:
        """Share of the true nearest rows that it finds, as measured when it was built."""
        return self.about["recall"]

    def find_nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Cosines and rows [q, k] of the nearest k to each of `queries` [q, d] of length 1; row -1 where fewer are found."""
        count = min(max(self.about["refined"], 4 * k), len(self.rows))
        found = [self._find(part, k, count) for part in queries.split(max(1, COMPARED // count))]
        cosines, rows = zip(*found, strict=True)
        return torch.cat(cosines), torch.cat(rows)

    def _find(self, queries: Tensor, k: int, count: int) -> tuple[Tensor, Tensor]:
        found = self.index.search(queries.numpy(), count)[1]
        wanted, places = np.unique(found, return_inverse=True)
        values = self.rows.take(np.maximum(wanted, 0))[torch.from_numpy(places.reshape(found.shape))]  # [q, count, d]
        cosines = torch.einsum("qd,qcd->qc", queries, values)
        cosines[torch.from_numpy(found < 0)] = -2
        best, at = cosines.topk(min(k, count), dim=1)
        return best.clamp(min=-1), torch.from_numpy(found).gather(1, at)

    # --- building

    def _train(self) -> Any:
        """An index without rows, made from a sample of them."""
        count, dim = len(self.rows), self.rows.folder.dim
        cells = count_cells(count)
        sample = self.rows.take(evenly_spaced(count, max(SAMPLED * cells, CODED)))
        centers = find_centers(sample[:: max(1, len(sample) // (SAMPLED * cells))], cells, 0, "index: cells")
        each = 8 if dim >= 256 else 4  # numbers for a byte of the code; FAISS is ten times as quick as with 6 or 12
        length = max(n for n in range(1, max(1, dim // each) + 1) if dim % n == 0)
        bits = min(8, int(math.log2(len(sample) / 2)))
        flat = self.faiss.IndexFlatIP(dim)
        flat.add(centers.numpy())
        index = self.faiss.IndexIVFPQ(flat, dim, cells, length, bits, self.faiss.METRIC_INNER_PRODUCT)
        index.nprobe = max(32, cells // 32)
        index.pq.cp.niter, index.pq.cp.min_points_per_centroid = 10, 1  # it would warn of few rows
        for _ in track(range(1), 1, "index: codes"):
            index.train(sample[:: -(-len(sample) // CODED)].numpy())
        return index

    def _add(self) -> None:
        """Add the rows that the index does not hold yet; what is added is saved from time to time."""
        saved, start = time.monotonic(), 0
        for block in track(self.rows.iterate(BLOCK), -(-len(self.rows) // BLOCK), "index: rows"):
            if start >= self.index.ntotal:
                self.index.add(block.numpy())
                if time.monotonic() > saved + SAVED:
                    self._save()
                    saved = time.monotonic()
            start += len(block)

    def _measure(self) -> None:
        """Measure recall by some evenly spaced rows, and compare as many rows exactly as a good one takes."""
        queries = self.rows.take(evenly_spaced(len(self.rows), AT_ONCE))
        true = find_exactly(self.rows, queries, MEASURED)[1]
        for self.about["refined"] in REFINED:
            found = self.find_nearest(queries, MEASURED)[1]
            self.about["recall"] = (true[:, :, None] == found[:, None]).any(dim=2).float().mean().item()
            if self.recall >= ENOUGH:
                break

    # --- its file

    def _save(self) -> None:
        with files.replacing(self.path) as temporary:
            self.faiss.write_index(self.index, str(temporary))
            about = self.about | {"sha256": _hash_file(temporary, temporary.stat().st_size)}
            with temporary.open("ab") as file:
                file.write(json.dumps(about).encode().ljust(ABOUT))

    def _read(self) -> None:
        size = self.path.stat().st_size - ABOUT
        try:
            with self.path.open("rb") as file:
                file.seek(max(0, size))
                about = json.loads(file.read())
            right = about.pop("sha256") == _hash_file(self.path, size) and about["embedding"] == self.rows.folder.digest
        except (ValueError, KeyError, TypeError, AttributeError):
            about, right = {}, False
        if not right:
            raise ValueError(
                f"the index {self.path} is older than its embedding {self.rows.folder.path}, or damaged; add --rebuild."
            )
        self.index, self.about = self.faiss.read_index(str(self.path)), about
        if about["recall"] is None:
            say(f"{self.path} is not whole: it goes on after {self.index.ntotal:,} of {len(self.rows):,} rows.")


def _hash_file(path: Path, size: int) -> str:
    """SHA-256 of the first bytes of a file."""
    return hashlib.sha256(np.memmap(path, np.uint8, "r")[:size].data).hexdigest()


# --- exactly -----------------------------------------------------------------------------------------------------------


def find_exactly(rows: Rows, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and rows [q, k] of the k rows nearest to each of `queries` [q, d] of length 1. All rows are read once."""
    best, found = queries.new_full((len(queries), 0), 0.0), torch.zeros(len(queries), 0, dtype=torch.int64)
    start = 0
    for block in track(rows.iterate(BLOCK), -(-len(rows) // BLOCK), "exact search"):
        cosines, near = find_neighbors(queries, block, k)
        best, at = torch.cat([best, cosines], dim=1).topk(min(k, start + len(block)), dim=1)
        found = torch.cat([found, near + start], dim=1).gather(1, at)
        start += len(block)
    return best, found
