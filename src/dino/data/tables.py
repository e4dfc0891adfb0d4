"""Images in tables: Parquet files, and data sets of Hugging Face as `save_to_disk` writes them.

The library `datasets` reads each row group once and keeps the rows in files that are mapped into memory, in its own cache.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dino import errors
from dino.data.decode import BadImage, decode
from dino.data.labels import number_classes
from dino.data.listing import look_into
from dino.data.sources import evenly_spaced
from dino.data.storage import find_matching, is_remote

SUFFIX = ".parquet"
_SAVED = ("dataset_info.json", "dataset_dict.json")  # what `save_to_disk` writes of one part, and of several
_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "bytes", "image_bytes", "file", "path", "file_name")
_LABEL_COLUMNS = ("label", "labels", "class", "cls", "fine_label", "target")
_LOOKED_AT = 64  # rows whose content is part of the fingerprint
_TEST_PARTS = ("test", "validation", "val", "valid")


class Table:
    """A `Source` of the rows of a `datasets.Dataset`.

    Args:
        column: of images: bytes, the path of a file, or both.
        folder: where such paths begin.
    """

    def __init__(
        self, rows: Any, column: str, folder: str, classes: tuple[str, ...] = (), labels: np.ndarray | None = None
    ):
        self.rows, self.column, self.folder, self.classes, self.labels = rows, column, folder, classes, labels
        described = json.dumps([str(rows.features), len(rows), classes]).encode()
        digest = hashlib.sha256(described + (b"" if labels is None else labels.astype("<i8").tobytes()))
        for index in evenly_spaced(len(rows), _LOOKED_AT):  # rows have no names to tell one table from another
            content, path = self._get(index)
            digest.update(hashlib.sha256(content or os.fsencode(path or "")).digest())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        path = self._get(index)[1]
        return f"row {index}" if path is None else f"row {index} ({os.path.basename(path)})"

    def stamp(self) -> str:
        return str(self.rows._fingerprint)

    def read(self, index: int) -> np.ndarray:
        return decode(self.read_bytes(index))

    def read_bytes(self, index: int) -> bytes:
        content, path = self._get(index)
        if content is not None:
            return content
        try:
            return Path(self.folder, path or "").read_bytes()
        except OSError as error:
            raise BadImage(f"its file '{path}' cannot be read ({error.strerror})") from error

    def _get(self, index: int) -> tuple[bytes | None, str | None]:
        value = self.rows[index][self.column]
        if isinstance(value, Mapping):
            return value.get("bytes"), value.get("path")
        return (value, None) if isinstance(value, bytes) else (None, value)


def find_tables(spec: str) -> list[str] | str | None:
    """The Parquet files that a spec of data names, or the folder of `save_to_disk`; None where it names something else."""
    path = spec if is_remote(spec) else os.path.abspath(os.path.expanduser(spec))
    if path.lower().endswith(SUFFIX):
        return find_matching(path) if any(sign in path for sign in "*?") else [path]
    if path.lower().endswith(".tar"):
        return None
    inside = look_into(path)
    if any(name in _SAVED for name in inside):
        return path
    return sorted(os.path.join(path, name) for name in inside if name.lower().endswith(SUFFIX)) or None


def open_tables(spec: str, found: list[str] | str, labels: str) -> tuple[Table, Table | None]:
    """Training and test rows of what `find_tables` found.

    Args:
        labels: 'none'; or 'auto' or 'folders', which mean a column of labels, if there is one.

    Raises:
        ValueError: it cannot be read, or has no column of images.
    """
    datasets = errors.import_optional("datasets", f"{spec} needs the package datasets", "data")
    try:
        if isinstance(found, list):
            parts = datasets.load_dataset("parquet", data_files=_split(found))
        else:
            parts = datasets.load_from_disk(found)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{spec} cannot be read as a table ({errors.first_line(error)}); check the files, the name, and the network."
        ) from error
    if isinstance(parts, datasets.Dataset):
        parts = {"train": parts}
    train = parts.get("train", next(iter(parts.values())))
    test = next((parts[name] for name in _TEST_PARTS if name in parts and parts[name] is not train), None)
    folder = found if isinstance(found, str) else os.path.dirname(found[0])
    return _make(datasets, train, spec, folder, labels), test and _make(datasets, test, spec, folder, labels)


def _split(files: list[str]) -> dict[str, list[str]]:
    """Parquet files by the part that their names begin with, as in train-00000-of-00002.parquet."""
    parts: dict[str, list[str]] = {}
    for file in files:
        word = os.path.basename(file).split(".")[0].split("-")[0]
        parts.setdefault(word if word in ("train", *_TEST_PARTS) else "train", []).append(file)
    return parts


def _make(datasets: Any, rows: Any, spec: str, folder: str, labels: str) -> Table:
    features = rows.features
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    images += [name for name in _IMAGE_COLUMNS if name in features and name not in images]
    if not images:
        raise ValueError(
            f"{spec} has no column of images (its columns are {', '.join(features)}); name one 'image', with the bytes of a "
            "file or its path."
        )
    column = images[0]
    if isinstance(features[column], datasets.Image):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    known = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    known += [name for name in _LABEL_COLUMNS if name in features and name not in known]
    classes, numbers = (), None
    if labels != "none" and known:
        values = rows[known[0]]
        kind = features[known[0]]
        if isinstance(kind, datasets.ClassLabel):
            classes, numbers = tuple(kind.names), np.array([-1 if v is None else v for v in values], np.int64)
        else:
            classes, numbers = number_classes([None if value is None else str(value) for value in values])
    return Table(rows.select_columns([column]), column, folder, classes, numbers)
