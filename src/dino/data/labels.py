"""Labels of images: from the first folder level, or from a CSV file of path,label."""

from __future__ import annotations

import csv
import difflib
import io
import os
from collections.abc import Set
from pathlib import Path
from posixpath import normpath

import numpy as np

from dino.data.decode import IMAGE_SUFFIXES

_PATH_COLUMNS, _LABEL_COLUMNS = ("path", "file", "filename", "image"), ("label", "class")


def assign_labels(labels: str, names: list[str], path: str, root: str) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Classes and labels of the images; see `open_source` for `labels`."""
    if labels == "none":
        return (), None
    if labels not in ("auto", "folders"):
        return number_classes(_from_table(labels, names, root))
    if labels == "auto" and path.lower().endswith(".csv") and any(label is not None for _, label in read_table(path)):
        return number_classes(_from_table(path, names, root))
    heads = [name.partition("/")[0] if "/" in name else None for name in names]
    found = set(heads)
    if labels == "auto" and (len(found) < 2 or len(names) < 2 * len(found) or found & {None, "", ".."}):
        return (), None
    if found == {None}:
        raise ValueError(
            f"no image of '{path}' lies in a sub-folder that names its class; write CLASS/image.jpg there (to train "
            "without classes, use labels 'auto' or 'none')."
        )
    return number_classes(heads)


def number_classes(values: list[str | None]) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Class names in order and the position of each value among them, -1 where unknown."""
    classes = sort_classes({value for value in values if value is not None})
    position: dict[str | None, int] = {name: index for index, name in enumerate(classes)}
    return classes, np.array([position.get(value, -1) for value in values], np.int64) if classes else None


def sort_classes(names: Set[str]) -> tuple[str, ...]:
    """Class names in order, numbers by value."""
    numeric = all(name.isascii() and name.isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numeric else 0, name)))


def _from_table(labels: str, names: list[str], root: str) -> list[str | None]:
    """The label of each image by a CSV file; None where it has none."""
    table = os.path.abspath(os.path.expanduser(labels))
    if not os.path.isfile(table):
        if close := difflib.get_close_matches(labels, ("auto", "folders", "none"), n=1):
            advice = f"did you mean '{close[0]}'?"
        else:
            advice = "this is a folder." if os.path.isdir(table) else suggest_path(table)
        raise ValueError(f"labels is '{labels}'; it must be 'auto', 'folders', 'none' or a CSV file: {advice}")
    rows = read_table(table)
    if not any(label is not None for _, label in rows):
        raise ValueError(f"The labels file '{labels}' has no column of labels; give it the columns path,label.")
    known: dict[str, str | None] = {}
    for folder in (os.path.dirname(table), root):  # relative to the images' folder wins; in a table, the later row
        known |= {normpath(os.path.join(folder, name)): label for name, label in rows}
    keys = [normpath(os.path.join(root, name)) for name in names]
    if known.keys().isdisjoint(keys):
        raise ValueError(
            f"The labels file '{labels}' matches no image: it names e.g. '{rows[0][0]}', the images are e.g. "
            f"'{names[0]}'; write paths relative to the images' folder or to the CSV."
        )
    return [label if (label := known.get(key)) not in ("", "-1") else None for key in keys]


def read_table(path: str) -> list[tuple[str, str | None]]:
    """(path, label) of each row of a CSV file. Labels are None without a column of labels, and "" where a cell is empty."""
    try:
        rows = [row for row in csv.reader(io.StringIO(read_text(path), newline="")) if any(map(str.strip, row))]
    except csv.Error as error:
        raise ValueError(f"'{path}' is not a valid CSV file ({error}); write the columns path,label.") from error
    if not rows:
        return []
    header = [cell.strip().lower() for cell in rows[0]]
    image, label = 0, 1 if len(header) > 1 else None
    if os.path.splitext(header[0])[1] not in IMAGE_SUFFIXES:
        image = next((header.index(name) for name in _PATH_COLUMNS if name in header), None)
        label = next((header.index(name) for name in _LABEL_COLUMNS if name in header), None)
        if image is None:
            raise ValueError(
                f"'{path}' begins with the row {','.join(rows[0])!r}, which is neither an image nor a header with a "
                "column 'path'; write path,label there."
            )
        rows = rows[1:]
    table = [(_cell(row, image), None if label is None else _cell(row, label)) for row in rows]
    return [(name, value) for name, value in table if name]


def _cell(row: list[str], column: int) -> str:
    return row[column].strip() if column < len(row) else ""


def read_text(path: str) -> str:
    try:
        content = Path(path).read_bytes().decode("utf-8-sig", "surrogateescape")  # names need not be valid UTF-8
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read: {error.strerror}; check its permissions.") from error
    if "\0" in content:
        raise ValueError(f"'{path}' is not plain text (UTF-16 perhaps); save it as UTF-8.")
    return content


def read_lines(path: str) -> list[str]:
    """The lines of a list file, without empty ones and those that begin with '#'."""
    lines = (line.strip() for line in read_text(path).split("\n"))
    return [line for line in lines if line and not line.startswith("#")]


def suggest_path(path: str) -> str:
    """Advice about the missing `path`, the end of a sentence: an existing name like the first part of it that is wrong."""
    while not os.path.exists(parent := os.path.dirname(path)):
        path = parent
    try:
        siblings = os.listdir(parent)
    except OSError:
        siblings = []
    if close := difflib.get_close_matches(os.path.basename(path), siblings, n=1):
        return f"did you mean '{os.path.join(parent, close[0])}'?"
    return f"'{parent}' exists, so check the spelling of what follows it."
