"""All images of an embedding: where they lie on a map, which are near-copies, and lists of those that were chosen.

What visitors tag and leave out is kept here, so that it survives when the page is loaded again. What comes from the page
is checked here, as in `explorer`.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.path import Path as Outline
from PIL import Image

from dino import files
from dino.data.open import name_in_list, require_files
from dino.data.sources import Source, evenly_spaced, read_or_gray
from dino.features.copies import Copies, Copy, find_copies
from dino.features.embedding import Embedding
from dino.features.layout import lay_out_once, pick_colors
from dino.html import get_label

THUMBNAIL = 240  # pixels of the longer side
NUM_CHOSEN = 48  # images that are shown of those chosen
MOST_SHAPES, MOST_NUMBERS = 50, 20_000  # outlines of a selection; their coordinates
NUM_GROUPS, MOST_OF_GROUP = 6, 24  # groups of near-copies on a page, and images of each
MANY_POINTS = 5000  # more are drawn by the graphics card
NAME = re.compile(r"\w[\w .-]{0,98}\.(txt|csv)")  # of a list: it lies in the folder for lists, and nowhere else
CHOSEN, OTHERS, TAGGED = "those chosen", "all others", "all with the tag above"  # what a list has
NOTHING = "Nothing is chosen: draw around some points, or click on one."
TAG = re.compile(r"\w[\w .-]{0,48}")

Captioned = tuple[np.ndarray, str]


class Atlas:
    """`images` is what `embedding` was made of. A row is a number of its images."""

    def __init__(self, embedding: Embedding, images: Source):
        self.embedding, self.images = embedding, images
        self.tags: dict[int, list[str]] = {}  # by row
        self.left_out: set[int] = set()  # rows of near-copies that the list of the rest leaves out

    # --- images ----------------------------------------------------------------------------------------------------

    def get_name(self, row: int) -> str:
        """Whatever bytes the name has, it can be shown."""
        return self.embedding.names[row].encode(errors="replace").decode()

    def get_label(self, row: int) -> str | None:
        return get_label(self.images, int(self.embedding.positions[row]))

    def draw(self, row: int, before: str = "", after: str = "", pale: bool = False) -> Captioned:
        """An image and its whole name, between two texts."""
        thumbnail = draw_thumbnail(self.images, int(self.embedding.positions[row]))
        if pale:
            thumbnail = (0.25 * thumbnail + 0.75 * 200).astype(np.uint8)
        return thumbnail, before + self.get_name(row) + after

    # --- the map ---------------------------------------------------------------------------------------------------

    @cached_property
    def points(self) -> np.ndarray:
        """[n, 2]"""
        return lay_out_once(self.embedding)

    @cached_property
    def groups(self) -> dict[str, np.ndarray]:
        """Rows by class, a color each; those without a class last, or all images as one group."""
        labels = [self.get_label(row) for row in range(len(self.embedding))]
        names = [name for name in self.images.classes if name in {*labels}]
        order = np.array([len(names) if label is None else names.index(label) for label in labels])
        rest = "no class" if names else "images"
        parts = {name: np.flatnonzero(order == number) for number, name in enumerate([*names, rest])}
        return {name: rows for name, rows in parts.items() if len(rows)}

    def draw_map(self) -> str:
        """The map for Plotly, as JSON."""
        kind, size = ("scattergl", 4) if len(self.embedding) > MANY_POINTS else ("scatter", 6)
        traces: list[dict[str, Any]] = []
        for (name, rows), color in zip(self.groups.items(), pick_colors(len(self.groups)), strict=True):
            x, y = self.points[rows].round(3).T.tolist()
            trace = {"type": kind, "mode": "markers", "name": write_plainly(name), "x": x, "y": y}
            trace |= {"customdata": rows.tolist(), "marker": {"size": size, "color": color, "opacity": 0.8}}
            trace |= {"text": [write_plainly(self.get_name(row)) for row in rows], "hovertemplate": "%{text}"}
            traces.append(trace)
        axis = {"visible": False, "automargin": False}
        layout = {"dragmode": "lasso", "hovermode": "closest", "showlegend": len(traces) > 1, "height": 560}
        layout |= {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "font": {"color": "#808590"}}
        layout |= {"margin": {"l": 8, "r": 8, "t": 36, "b": 8}, "xaxis": axis, "yaxis": axis | {"scaleanchor": "x"}}
        modebar = {"bgcolor": "rgba(0,0,0,0)", "color": "#a0a4ac", "activecolor": "#4f46e5"}
        layout |= {"legend": {"itemsizing": "constant"}, "modebar": modebar}
        config = {"displaylogo": False, "displayModeBar": True, "scrollZoom": True}
        return json.dumps({"data": traces, "layout": layout, "config": config})

    def choose(self, chosen: object) -> list[int]:
        """Rows within outlines that were drawn on the map.

        Args:
            chosen: {"shapes": [[x, y, x, y, ...], ...], "hidden": numbers of groups that were not shown}, or {"row": row}.
        """
        if not isinstance(chosen, dict):
            raise ValueError("A selection must be outlines or a row.")
        if "row" in chosen:
            return [check_whole(chosen["row"], 0, len(self.embedding) - 1, "The row of an image")]
        shapes, hidden = chosen.get("shapes"), chosen.get("hidden")
        if not isinstance(shapes, list) or not isinstance(hidden, list) or len(shapes) > MOST_SHAPES:
            raise ValueError("A selection must be outlines or a row.")
        inside = np.zeros(len(self.embedding), bool)
        for shape in shapes:
            inside |= Outline(_check_shape(shape)).contains_points(self.points)
        names = [*self.groups]
        for number in hidden:
            inside[self.groups[names[check_whole(number, 0, len(names) - 1, "The number of a class")]]] = False
        return np.flatnonzero(inside).tolist()

    def describe(self, rows: list[int]) -> str:
        """How many, and of which classes."""
        if not rows:
            return NOTHING
        counts = Counter(label for row in rows if (label := self.get_label(row)) is not None)
        named = ", ".join(f"{name} {count:,}" for name, count in counts.most_common(8))
        named += (
            f", of {len(counts) - 8} more classes {sum(counts.values()) - sum(n for _, n in counts.most_common(8)):,}"
            * (len(counts) > 8)
        )
        said = f"{len(rows):,} of {len(self.embedding):,} images" + (f": {named}" if named else "")
        return said + (f". {NUM_CHOSEN} of them are shown." if len(rows) > NUM_CHOSEN else ".")

    def draw_chosen(self, rows: list[int]) -> list[Captioned]:
        shown = [rows[i] for i in evenly_spaced(len(rows), NUM_CHOSEN)]
        return [self.draw(row, after="".join(f" · {tag}" for tag in self.tags.get(row, []))) for row in shown]

    def tag(self, rows: list[int], tag: object, remove: bool = False) -> None:
        """Give each of `rows` this tag, or take it away."""
        tag = read_text(tag)
        if not TAG.fullmatch(tag):
            raise ValueError("A tag must be a word of letters, digits, spaces, dots, dashes, at most 49 of them.")
        if not rows:
            raise ValueError("Choose images on the map first.")
        for row in rows:
            others = [other for other in self.tags.pop(row, []) if other != tag]
            if others or not remove:
                self.tags[row] = others if remove else [*others, tag]

    def count_tags(self) -> dict[str, int]:
        return dict(sorted(Counter(tag for tags in self.tags.values() for tag in tags).items()))

    def describe_tags(self) -> str:
        return "Tags: " + (", ".join(f"{tag} ({count:,})" for tag, count in self.count_tags().items()) or "none yet")

    # --- near-copies -----------------------------------------------------------------------------------------------

    @cached_property
    def copies(self) -> Copies:
        """Found once. At first all but the best of each group are left out."""
        found = find_copies(self.embedding, self.images)
        self.left_out |= {copy.row for group in found.groups for copy in group[1:]}
        return found

    def count_pages(self) -> int:
        return max(1, math.ceil(len(self.copies.groups) / NUM_GROUPS))

    def list_groups(self, page: object) -> list[tuple[int, list[Copy]]]:
        """The groups of a page (from 1), each with its number."""
        start = NUM_GROUPS * (check_whole(page, 1, self.count_pages(), "The page") - 1)
        return list(enumerate(self.copies.groups[start : start + NUM_GROUPS], start + 1))

    def draw_group(self, group: list[Copy]) -> list[Captioned]:
        drawn = []
        for copy in group[:MOST_OF_GROUP]:
            size = "" if copy.view is None else f" ({copy.view.width} x {copy.view.height})"
            out = copy.row in self.left_out
            drawn.append(self.draw(copy.row, "✗ left out: " if out else "✓ kept: ", size, pale=out))
        return drawn

    def toggle(self, page: object, slot: int, position: object) -> None:
        """Leave out an image of a group of the page, or keep it again."""
        groups = self.list_groups(page)
        group = groups[check_whole(slot, 0, len(groups) - 1, "The number of a group")][1]
        last = min(len(group), MOST_OF_GROUP) - 1
        self.left_out ^= {group[check_whole(position, 0, last, "The position of an image")].row}

    def describe_copies(self) -> str:
        found, count = self.copies, sum(map(len, self.copies.groups))
        said = f"{count:,} of {len(self.embedding):,} images are near-copies"
        if found.groups:
            said += f", in {len(found.groups):,} group{'s' * (len(found.groups) > 1)}"
            said += f". Marked to be left out: {len(self.left_out):,}; **click on an image** to change that"
        return " ".join([f"{said}.", *found.notes])

    # --- lists -----------------------------------------------------------------------------------------------------

    def list_rest(self) -> list[int]:
        return [row for row in range(len(self.embedding)) if row not in self.left_out]

    def list_rows(self, which: object, chosen: list[int], tag: object) -> list[int]:
        """Those `chosen`, all others, or all with a tag."""
        if which == TAGGED:
            tag = read_text(tag)
            if tag not in (tags := self.count_tags()):
                known = ", ".join(tags) or "there is none yet"
                raise ValueError(f"Write a tag that images have into the box above: {known}.")
            return [row for row in sorted(self.tags) if tag in self.tags[row]]
        if not chosen:
            raise ValueError("Choose images on the map first.")
        return sorted({*range(len(self.embedding))} - {*chosen}) if which == OTHERS else chosen

    def write_list(self, folder: Path, name: object, rows: Iterable[int]) -> str:
        """Write where images lie: a .txt file as `--data` takes it, or a .csv file with labels and tags.

        Returns what to do next.

        Raises:
            ValueError: the name is not one, a file has it already, the images are no files, or there are none.
        """
        name = read_text(name)
        if not NAME.fullmatch(name):
            raise ValueError(
                "Give the list a plain name (letters, digits, spaces, dots, dashes; no folder) that ends in .txt or .csv "
                "in small letters, for example mine.csv."
            )
        rows, out = list(rows), folder.expanduser() / name
        if not rows:
            raise ValueError("There are no images to write: choose others.")
        if out.exists():
            raise ValueError(f"{out} exists; choose another name.")
        require_files(self.images)
        lines = [name_in_list(self.images, int(self.embedding.positions[row])) for row in rows]
        files.check_writable(out, ".txt .csv", option="The list")
        with (
            files.replacing(out) as temporary,
            temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            if out.suffix == ".txt":
                file.writelines(f"{line}\n" for line in lines)
            else:
                labels = [self.get_label(row) or "" for row in rows]
                tags = [",".join(self.tags.get(row, [])) for row in rows]
                columns = {"path": lines} | ({"label": labels} if any(labels) else {}) | {"tags": tags}
                csv.writer(file).writerows([[*columns], *zip(*columns.values(), strict=True)])
        return f"{len(rows):,} images are in `{out}`. To train on them: `dino train --data {out}`"


def read_text(value: object) -> str:
    """What a visitor wrote; "" if the request holds something else."""
    return value.strip() if isinstance(value, str) else ""


def check_whole(value: object, least: int, most: int, what: str) -> int:
    """`value`, if it is a whole number in this range.

    Raises:
        ValueError: it is not.
    """
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} must be a whole number from {least} to {most}.")
    return value


def _check_shape(shape: object) -> np.ndarray:
    """An outline [n, 2]."""
    numbers = shape if isinstance(shape, list) and len(shape) <= MOST_NUMBERS else []
    right = all(type(number) in (int, float) and abs(number) < 1e9 for number in numbers)
    if not right or len(numbers) < 6 or len(numbers) % 2:
        raise ValueError("An outline must be three points or more, each of two numbers.")
    return np.reshape(np.asarray(numbers, np.float64), (-1, 2))


def write_plainly(name: str) -> str:
    """A name for Plotly, which would take what is in angle brackets for a tag."""
    return name.replace("&", "&amp;").replace("<", "&lt;")


def draw_thumbnail(source: Source, position: int) -> np.ndarray:
    """A gray square where the image cannot be read."""
    picture = Image.fromarray(read_or_gray(source, position))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.asarray(picture)
