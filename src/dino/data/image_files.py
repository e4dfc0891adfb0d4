"""Image files as a `Source`: of a folder or a list, on a disk or elsewhere; and single images."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dino.data.decode import BadImage, decode, open_file
from dino.data.labels import assign_labels
from dino.data.listing import Names, list_names, locate
from dino.data.reader import Reader
from dino.data.storage import Place, describe_all, is_remote, list_files


class Files:
    """A `Source` of image files. `name(i)` is relative to `root` (or as written in the list file).

    `path` is the folder or the list that names them.
    """

    def __init__(
        self,
        root: str,
        names: Names,
        classes: tuple[str, ...] = (),
        labels: np.ndarray | None = None,
        path: str = "",
        reader: Reader | None = None,
    ):
        self.reader = reader or Reader()
        self.root, self.names, self.classes, self.labels, self.path = root, names, classes, labels, path or root
        digest = hashlib.sha256(names.blob)
        if labels is not None:
            digest.update(json.dumps(classes).encode() + labels.astype("<i8").tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def stamp(self) -> str:
        digest = hashlib.sha256()
        for index in range(len(self)):
            try:
                status = os.stat(self.find_place(index).path)
                digest.update(b"%d %d;" % (status.st_size, status.st_mtime_ns))
            except OSError:
                digest.update(b"gone;")
        return digest.hexdigest()

    def find_place(self, index: int) -> Place:
        return Place(os.path.join(self.root, self.names[index]))

    def read_ahead(self, indices: Sequence[int]) -> None:
        self.reader.read_ahead([self.find_place(index) for index in indices])

    def read(self, index: int) -> np.ndarray:
        return decode(self.find_place(index).path)

    def read_bytes(self, index: int) -> bytes | None:
        with open_file(self.find_place(index).path) as stream:
            return stream.getvalue() if isinstance(stream, io.BytesIO) else None


class RemoteFiles(Files):
    """Image files below an address, or at addresses that a list names."""

    def stamp(self) -> str:
        described = list_files(self.root) if self.root else describe_all(self.names.split())
        return hashlib.sha256(repr(described).encode(errors="surrogateescape")).hexdigest()

    def read(self, index: int) -> np.ndarray:
        return decode(self.read_bytes(index))

    def read_bytes(self, index: int) -> bytes:
        try:
            return self.reader.read(self.find_place(index))
        except FileNotFoundError as error:
            raise BadImage("it is not there") from error


def open_source(
    spec: str | os.PathLike[str],
    labels: str = "auto",
    record: Path | None = None,
    trust: bool = False,
    reader: Reader | None = None,
) -> Files:
    """The images of a folder (searched at any depth, sorted by path) or of a list file (in the order of the list).

    A list is a .txt file (one path or address per line; '#' starts a comment line) or a .csv file (columns path and, if
    known, label); its paths are relative to it, and each counts once. Hidden files and folders, and those in which systems
    keep thumbnails or deleted files, are skipped. Links to folders are followed once, but not to a folder above this one.

    labels: 'auto' (the list's labels; else the first folder level if it looks like classes), 'folders' (the first
    folder level), 'none', or a CSV file of path,label with paths relative to the images' folder or to the CSV.
    record: the file of a run with the names. Its folder, the run directory, is not searched: a run's images are not data.
    trust: take the names from `record`, even if the files have changed, as a resumed run must.

    Raises ValueError, in one sentence, when the spec or the labels cannot be what was meant.
    """
    path = locate(spec)
    root = path if is_remote(path) or os.path.isdir(path) else os.path.dirname(path)
    names = list_names(path, record, trust)
    classes, indices = assign_labels(labels, names.split(), path, root)
    if not is_remote(path) and is_remote(names[0]):
        root = ""
    kind = RemoteFiles if is_remote(path) or not root else Files
    return kind(root, names, classes, indices, path, reader)


def open_listed(folder: Path, names: Sequence[str], by: str, layout: str) -> Files:
    """The images `names` of a folder, in that order.

    Args:
        by: the file that names them; layout: which files should be where. Both for the error.

    Raises:
        ValueError: one is missing, or none is named.
    """
    if not names:
        raise ValueError(f"{by} names no image; {layout}.")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(
            f"{len(missing)} of the {len(names)} files that {by} names are missing, first {folder / missing[0]}; {layout}."
        )
    return Files(str(folder), Names(names))


class Images:
    """Image files or arrays [h, w, 3] uint8 as a `Source` without labels."""

    classes, labels, fingerprint = (), None, ""

    def __init__(self, items: Sequence[str | os.PathLike[str] | np.ndarray]):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def name(self, index: int) -> str:
        item = self.items[index]
        return f"image {index}" if isinstance(item, np.ndarray) else os.fspath(item)

    def stamp(self) -> str:
        return ""

    def read(self, index: int) -> np.ndarray:
        item = self.items[index]
        if not isinstance(item, np.ndarray):
            return decode(Path(item))
        if item.ndim != 3 or item.shape[2] != 3 or item.dtype != np.uint8 or not item.size:
            raise BadImage(f"an array {item.dtype} {list(item.shape)}, where uint8 [h, w, 3] is an image")
        return item
