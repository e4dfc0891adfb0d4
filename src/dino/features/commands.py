"""The commands embed, search, duplicates and outliers: they print a table and write JSON and a page of thumbnails."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dino import distributed
from dino.data.open import expand_images
from dino.data.sources import Source
from dino.features import embed as embeddings
from dino.features import search as finding
from dino.files import check_writable
from dino.html import NUM_NEIGHBORS, NeighborRow, read_row, read_square, render, write_page
from dino.options.commands import DuplicatesOptions, EmbedOptions, FindOptions, OutliersOptions, SearchOptions

MOST_ROWS = 50  # of a page
NAMED = 20  # unreadable images that the terminal names; the metadata of the shards name all


def write_embedding(options: EmbedOptions) -> None:
    """Write the features of images, or those that are still missing."""
    o = options
    try:
        written = embeddings.embed(o.model, o.data, o.out, o.pooling, o.size, o.fp16, o.shard, o.device)
        if not distributed.is_main():
            return
        print(f"{o.out}: {written.rows:,} features of {written.dim} numbers, {written.about['shards']} files")
        if written.bad:
            print(f"{len(written.bad)} images could not be read and are left out:", file=sys.stderr)
            for name, reason in written.bad[:NAMED]:
                print(f"  {name}: {reason}", file=sys.stderr)
            if len(written.bad) > NAMED:
                print(f"  and {len(written.bad) - NAMED} more", file=sys.stderr)
    finally:
        distributed.stop()


def print_neighbors(options: SearchOptions) -> None:
    """Find the images of an embedding that are most like the images given."""
    embedding, paths = _open(options), [path for path, _ in expand_images(options.images)]
    found = finding.search(embedding, paths, options.k, options.index, options.model, options.device, options.rebuild)
    alike = [
        [(value, row) for value, row in zip(*pair, strict=True) if row >= 0]
        for pair in zip(found.cosine.tolist(), found.rows.tolist(), strict=True)
    ]
    result: dict[str, Any] = {"queries": []}
    for i, rows in enumerate(alike):
        print(name := found.queries.name(i))
        result["queries"].append({"query": name, "neighbors": _print_rows(embedding, rows)})
    if options.index != "flat":
        result["recall"] = found.used.measure_recall(options.k)
        print(f"recall@{options.k} of {options.index}: {100 * result['recall']:.1f} % of the exact neighbors")

    def draw(images: Source) -> Markup:
        shown = ((found.queries, i, Path(found.queries.name(i)).name, rows) for i, rows in enumerate(alike))
        return render("rows", rows=(_read_row(embedding, images, *row) for row in islice(shown, MOST_ROWS)))

    top = f"On the left the image asked for, then those of {len(embedding.names):,} most like it, with their cosines."
    _write(options, embedding, result, "Neighbors", top, draw)


def print_duplicates(options: DuplicatesOptions) -> None:
    """Find groups of images that are near-copies of each other."""
    embedding = _open(options)
    groups: list[list[tuple[float, int]]] = []
    for group in finding.duplicates(embedding, options.threshold, options.index, options.rebuild):
        cosine = embedding.values[group] @ embedding.values[group[0]]
        groups.append([*zip(cosine.tolist(), group, strict=True)])
    result: dict[str, Any] = {"threshold": options.threshold, "groups": []}
    for number, group in enumerate(groups, 1):
        print(f"group {number}: {len(group)} images")
        result["groups"].append(_print_rows(embedding, group))
    count, total = sum(map(len, groups)), len(embedding.names)
    of = "near-copies" if options.threshold is None else f"cosine {options.threshold:g} or more"
    said = f"{count:,} of {total:,} images are in {len(groups):,} groups of {of}"
    print(said)

    def draw(images: Source) -> Markup:
        shown = ((images, int(embedding.positions[g[0][1]]), f"1 of {len(g)}", g[1:]) for g in groups[:MOST_ROWS])
        return render("rows", rows=(_read_row(embedding, images, *row) for row in shown))

    top = f"{said}. On the left the first of each group, then others with their cosines to it."
    _write(options, embedding, result, "Near-copies", top, draw)


def print_outliers(options: OutliersOptions) -> None:
    """Find the images that are least like any other."""
    embedding = _open(options)
    scores = finding.outliers(embedding, options.k, options.index, options.rebuild)
    least = scores.topk(min(max(1, options.top), len(scores)), largest=False)
    rows = [*zip(least.values.tolist(), least.indices.tolist(), strict=True)]
    result = {"k": options.k, "outliers": _print_rows(embedding, rows)}

    def draw(images: Source) -> Markup:
        pixels = (read_square(images, int(embedding.positions[row])) for _, row in rows)
        return render(
            "outliers", images=((p, embedding.names[row], v) for p, (v, row) in zip(pixels, rows, strict=True))
        )

    top = f"Of {len(scores):,} images those least like their {options.k} nearest others, with the mean cosine."
    _write(options, embedding, result, "Outliers", top, draw)


# --- what they share -----------------------------------------------------------------------------------------------


def _open(options: FindOptions) -> embeddings.Embedding:
    for out, kind in ((options.html, ".html"), (options.json, ".json")):
        if out is not None:
            check_writable(out, kind)
    return embeddings.Folder.open(options.embedding).read()


def _print_rows(embedding: embeddings.Embedding, rows: Sequence[tuple[float, int]]) -> list[dict[str, Any]]:
    """Print cosines and rows as a table. Returns them for the JSON file."""
    for value, row in rows:
        print(f"  {value:7.4f}  {embedding.names[row]}")
    return [
        {"path": embedding.names[row], "index": int(embedding.positions[row]), "cosine": value} for value, row in rows
    ]


def _read_row(
    embedding: embeddings.Embedding,
    images: Source,
    source: Source,
    at: int,
    caption: str,
    rows: list[tuple[float, int]],
) -> NeighborRow:
    found = [(value, int(embedding.positions[row])) for value, row in rows[:NUM_NEIGHBORS]]
    return read_row(read_square(source, at), caption, None, images, found)


def _write(
    options: FindOptions,
    embedding: embeddings.Embedding,
    result: dict[str, Any],
    kicker: str,
    top: str,
    draw: Callable[[Source], Markup],
) -> None:
    """Write the result file and the page, if the options name them."""
    if options.json is not None:
        about = {
            "embedding": options.embedding,
            "model_sha256": embedding.folder.about["model_sha256"],
            "index": options.index,
        }
        Path(options.json).write_text(json.dumps(about | result, indent=2) + "\n")
    if options.html is not None:
        body = draw(embedding.images())
        write_page(Path(options.html), embedding.folder.path.name, kicker, render("text", text=top), {kicker: body})
