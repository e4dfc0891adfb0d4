"""The commands embed, search, duplicates and outliers: they print a table and write JSON and a page of thumbnails."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from dino import distributed, files
from dino.data.open import expand_images, require_files
from dino.data.sources import Source, read_or_gray
from dino.features import copies
from dino.features import search as finding
from dino.features.embed import embed
from dino.features.embedding import Folder, Mapped, Rows
from dino.features.ivfpq import AT_ONCE, MEASURED
from dino.features.select import select, write_list
from dino.features.shards import name_ranges
from dino.files import check_writable
from dino.html import render, write_page
from dino.options import commands
from dino.terminal import say

MOST_ROWS, MOST_COPIES = 50, 12  # of a page; of a group of near-copies
Draw = Callable[[Source], Markup]  # the page of an embedding, from its images
NAMED = 20  # unreadable images that the terminal names; the metadata of the shards name all


def write_embedding(options: commands.EmbedOptions) -> None:
    """Write the features of images, or those that are still missing."""
    o = options
    try:
        written = embed(o.model, o.data, o.out, o.pooling, o.size, o.fp16, o.shard, o.part, o.device)
        if not distributed.is_main():
            return
        shards = f"{len(written.files)} file{'s' * (len(written.files) != 1)}"
        print(f"{o.out}: {written.rows:,} features of {written.dim} numbers, {shards}")
        if written.missing:
            print(
                f"part {o.part} is done; of {written.about['shards']} files these of other parts are missing: "
                f"{name_ranges(written.missing)}"
            )
        if written.bad:
            print(f"{len(written.bad)} images could not be read and are left out:", file=sys.stderr)
            for name, reason in written.bad[:NAMED]:
                print(f"  {name}: {reason}", file=sys.stderr)
            if len(written.bad) > NAMED:
                print(f"  and {len(written.bad) - NAMED} more", file=sys.stderr)
    finally:
        distributed.stop()


def print_neighbors(options: commands.SearchOptions) -> None:
    """Find the images of an embedding that are most like the images given."""
    _check_outputs(options)
    embedding, paths = finding.open_rows(options.embedding), [path for path, _ in expand_images(options.images)]
    found = finding.search(embedding, paths, options.k, options.index, options.model, options.device, options.rebuild)
    result: dict[str, Any] = {"queries": []}
    for i, rows in enumerate(found.pairs):
        print(name := found.queries.name(i))
        result["queries"].append({"query": name, "neighbors": _print_rows(embedding, rows)})
    if (used := found.used.approximate) is not None:
        result["recall"] = used.recall
        print(f"recall@{MEASURED} of ivfpq: {100 * used.recall:.1f} % of the exact neighbors of {AT_ONCE} images")

    def draw(images: Source) -> Markup:
        return render("rows", rows=found.read_pictures(images, MOST_ROWS))

    top = f"On the left the image asked for, then those of {len(embedding):,} most like it, with their cosines."
    _write(options, embedding, result, "Neighbors", top, draw)


def print_duplicates(options: commands.DuplicatesOptions) -> None:
    """Find groups of images that are near-copies of each other, and say which of each group is the best to keep."""
    embedding = _open(options)
    try:
        images = embedding.folder.images()
    except ValueError as error:
        if options.json is not None or options.html is not None:
            raise ValueError(
                f"near-copies cannot be confirmed by their pixels, so none are written: {error}"
            ) from error
        say(f"Not confirmed by pixels, candidates by features alone: {error}")
        images = None
    if options.threshold is None:
        _refuse_list(options, embedding, "near-copies")
    found = copies.find_copies(embedding, images, options.threshold, options.index, options.rebuild)
    for note in found.notes:
        say(note)
    groups, freed = [], 0
    for number, group in enumerate(found.groups, 1):
        print(f"group {number}: {len(group)} images")
        for word, copy in zip(["keep", *["copy"] * (len(group) - 1)], group, strict=True):
            print(f"  {word}  {copy.cosine:.4f}  {_describe_size(copy):<24}  {embedding.names[copy.row]}")
        freed += sum(copy.view.bytes or 0 for copy in group[1:] if copy.view)
        keep, *others = (_list_copy(embedding, copy) for copy in group)
        groups.append({"keep": keep, "copies": others})
    count, total = sum(map(len, found.groups)), len(embedding)
    said = f"{count:,} of {total:,} images are in {len(groups):,} groups of near-copies"
    if freed:
        said += f"; the {count - len(groups):,} that are not to keep take {format_bytes(freed)}"
    print(said)
    result = {"threshold": options.threshold, "candidates_from": found.least, "confirmed": found.confirmed}

    def draw(images: Source) -> Markup:
        def read(copy: copies.Copy) -> tuple[np.ndarray, str, str, float]:
            pixels = read_or_gray(images, int(embedding.positions[copy.row]))
            return pixels, embedding.names[copy.row], _describe_size(copy), copy.cosine

        shown = ((len(group), [read(copy) for copy in group[:MOST_COPIES]]) for group in found.groups[:MOST_ROWS])
        return render("copies", groups=shown, left=len(found.groups) - MOST_ROWS)

    top = (
        f"{said}. First in each group, in green, is the best to keep: the most pixels, then the largest file. The pixels of "
        "each copy were compared with it."
    )
    _write(options, embedding, result | {"groups": groups}, "Near-copies", " ".join([*found.notes, top]), draw)


def print_outliers(options: commands.OutliersOptions) -> None:
    """Find the images that are least like any other."""
    embedding = _open(options)
    scores = finding.outliers(embedding, options.k, options.index, options.rebuild)
    if fault := _refuse_list(options, embedding, "outliers"):
        say(fault)
    least = scores.topk(min(max(1, options.top), len(scores)), largest=False)
    rows = [*zip(least.values.tolist(), least.indices.tolist(), strict=True)]
    say(f"Mean cosine with the {options.k} images nearest to it, the most unlike all others first:")
    result = {"k": options.k, "outliers": _print_rows(embedding, rows)}

    def draw(images: Source) -> Markup:
        shown = (
            (read_or_gray(images, int(embedding.positions[row])), embedding.names[row], value) for value, row in rows
        )
        return render("outliers", images=shown)

    top = f"{fault or ''} Of {len(scores):,} images those least like their {options.k} nearest others, with the mean cosine."
    _write(options, embedding, result, "Outliers", top, draw)


def write_selection(options: commands.SelectOptions) -> None:
    """Write a list of images for training: without near-copies, and spread evenly over what there is."""
    o = options
    out = check_writable(o.out, ".txt")
    if out.exists():
        raise ValueError(f"--out {o.out} exists; choose another, or delete it.")
    rows = Mapped(Folder.open(o.embedding))
    images = rows.folder.images()
    require_files(images)
    found = select(rows, o.keep, o.threshold, o.seed)
    write_list(rows, found.rows, images, out)
    total, kept, top = len(rows), len(found.rows), int(found.all_counts.argmax())
    print(
        f"{found.copies:,} of {total:,} images are near-copies of others (cosine {found.threshold:.4f} or more) and left out"
    )
    if kept < o.keep:
        print(f"--keep is {o.keep:,}, but only {kept:,} are left; all of them are kept")
    groups = f"{len(found.all_counts)} group{'s' * (len(found.all_counts) > 1)}"
    before, after = (100 * counts[top] / counts.sum() for counts in (found.all_counts, found.kept_counts))
    print(
        f"{out}: {kept:,} images of {groups}; the largest group holds {before:.1f} % of all, and {after:.1f} % of those kept"
    )


# --- what they share -----------------------------------------------------------------------------------------------


def _open(options: commands.FindOptions) -> Rows:
    _check_outputs(options)
    return finding.open_rows(options.embedding)


def _check_outputs(options: commands.FindOptions) -> None:
    for option, out, kind in (("--html", options.html, ".html"), ("--json", options.json, ".json")):
        if out is not None:
            check_writable(out, kind, option=option)


def _refuse_list(options: commands.FindOptions, embedding: Rows, what: str) -> str | None:
    """Why the model cannot tell the images apart, if so. A list, which may be used to delete images, is refused then."""
    fault = finding.judge_features(embedding)
    if fault and options.json is not None:
        raise ValueError(f"no list of {what} is written: {fault}")
    return fault


def _print_rows(embedding: Rows, rows: Sequence[tuple[float, int]]) -> list[dict[str, Any]]:
    """Print cosines and rows as a table. Returns them for the JSON file."""
    for value, row in rows:
        print(f"  {value:7.4f}  {embedding.names[row]}")
    return [
        {"path": embedding.names[row], "index": int(embedding.positions[row]), "cosine": value} for value, row in rows
    ]


def _list_copy(embedding: Rows, copy: copies.Copy) -> dict[str, Any]:
    """A copy for the JSON file."""
    entry = {"path": embedding.names[copy.row], "index": int(embedding.positions[copy.row]), "cosine": copy.cosine}
    view = copy.view
    return entry | ({} if view is None else {"width": view.width, "height": view.height, "bytes": view.bytes})


def _describe_size(copy: copies.Copy) -> str:
    """Width, height and size of its file, as far as they are known."""
    if copy.view is None:
        return ""
    edges = f"{copy.view.width} x {copy.view.height}"
    return edges if copy.view.bytes is None else f"{edges}, {format_bytes(copy.view.bytes)}"


def format_bytes(count: int) -> str:
    """For people: "980 bytes", "35 kB", "3.4 MB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"
    return f"{count} bytes"


def _write(
    options: commands.FindOptions, embedding: Rows, result: dict[str, Any], kicker: str, top: str, draw: Draw
) -> None:
    """Write the result file and the page, if the options name them."""
    if options.json is not None:
        about = {
            "embedding": options.embedding,
            "model_sha256": embedding.folder.about["model_sha256"],
            "index": finding.choose_index(embedding, options.index),
        }
        files.write(Path(options.json).expanduser(), json.dumps(about | result, indent=2) + "\n")
    if options.html is not None:
        body, path = draw(embedding.folder.images()), Path(options.html).expanduser()
        write_page(path, embedding.folder.path.name, kicker, render("text", text=top), {kicker: body})
