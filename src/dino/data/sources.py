"""A `Source` is images by position: the files of a folder or list, arrays, or a part of another source."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from dino.data.decode import BadImage, decode, open_file
from dino.data.labels import assign_labels
from dino.data.listing import Names, list_names, locate
from dino.data.reader import Reader
from dino.data.storage import Place, is_remote, list_files
from dino.randomness import Stream, draw_words

MOST_LISTED = 2**24  # images; the positions of a part of more are not listed


class Source(Protocol):
    """Images by position. The order is fixed: a position means the same image in every process and run.

    A source of files may also have `read_bytes(index) -> bytes | None` and `read_ahead(indices)`, and one of many images
    `bounds` and `parts`; see the functions `read_bytes`, `read_ahead`, `find_bounds` and `find_parts`.
    """

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; () when unlabeled."""
        ...

    @property
    def labels(self) -> np.ndarray | None:
        """int64 [n], index into `classes`, -1 = unknown; None when unlabeled."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest of names and labels: which data this is."""
        ...

    def stamp(self) -> str:
        """Hex digest of sizes and times of all files: another one means that some content may have changed."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What people see: the path relative to the folder."""
        ...

    def read(self, index: int) -> np.ndarray:
        """[h, w, 3] uint8 RGB; raises `dino.data.decode.BadImage`."""
        ...


class Files:
    """A `Source` of image files. `name(i)` is relative to `root` (or as written in the list file).

    `path` is the folder or the list that names them. `reader` reads those that are not on a disk.
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
        if is_remote(self.root):
            return hashlib.sha256(repr(list_files(self.root)).encode(errors="surrogateescape")).hexdigest()
        for index in range(len(self)):
            try:
                status = os.stat(os.path.join(self.root, self.names[index]))
                digest.update(b"%d %d;" % (status.st_size, status.st_mtime_ns))
            except OSError:
                digest.update(b"gone;")
        return digest.hexdigest()

    def find_place(self, index: int) -> Place:
        return Place(os.path.join(self.root, self.names[index]))

    def read_ahead(self, indices: Sequence[int]) -> None:
        self.reader.read_ahead([self.find_place(index) for index in indices])

    def read(self, index: int) -> np.ndarray:
        if is_remote(self.root):
            return decode(self.read_bytes(index) or b"")
        return decode(os.path.join(self.root, self.names[index]))

    def read_bytes(self, index: int) -> bytes | None:
        if is_remote(self.root):
            try:
                return self.reader.read(self.find_place(index))
            except FileNotFoundError as error:
                raise BadImage("it is not there") from error
        with open_file(os.path.join(self.root, self.names[index])) as stream:
            return stream.getvalue() if isinstance(stream, io.BytesIO) else None


class Subset:
    """The images of `source` at `indices` (each in [0, n)), with their names, labels and classes."""

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray):
        chosen = np.asarray(indices, dtype=np.int64)
        assert chosen.ndim == 1
        assert not chosen.size or (chosen.min() >= 0 and chosen.max() < len(source))
        self.source, self.indices, self.classes = source, chosen, source.classes
        digest = hashlib.sha256(source.fingerprint.encode() + chosen.astype("<i8").tobytes())
        self.fingerprint = digest.hexdigest()

    @property
    def labels(self) -> np.ndarray | None:
        return self._labels

    @functools.cached_property
    def _labels(self) -> np.ndarray | None:
        return None if self.source.labels is None else self.source.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def locate(self, index: int) -> int:
        """The position in `source`."""
        return int(self.indices[index])

    def count_before(self, positions: np.ndarray) -> np.ndarray | None:
        """How many of these images lie before each position of `source`; None where they have another order."""
        return np.searchsorted(self.indices, positions) if (np.diff(self.indices) > 0).all() else None

    def name(self, index: int) -> str:
        return self.source.name(self.locate(index))

    def read_ahead(self, indices: Sequence[int]) -> None:
        read_ahead(self.source, [self.locate(index) for index in indices])

    def stamp(self) -> str:
        return self.source.stamp()

    def read(self, index: int) -> np.ndarray:
        return self.source.read(self.locate(index))

    def read_bytes(self, index: int) -> bytes | None:
        return read_bytes(self.source, self.locate(index))


class Remaining(Subset):
    """All images of a large source but few, without a list of them. `left_out`: sorted positions."""

    def __init__(self, source: Source, left_out: np.ndarray):
        self.source, self.left_out, self.classes = source, left_out, source.classes
        digest = hashlib.sha256(b"remaining" + source.fingerprint.encode() + left_out.astype("<i8").tobytes())
        self.fingerprint = digest.hexdigest()

    @functools.cached_property
    def _labels(self) -> np.ndarray | None:
        return None if self.source.labels is None else np.delete(self.source.labels, self.left_out)

    def __len__(self) -> int:
        return len(self.source) - len(self.left_out)

    def locate(self, index: int) -> int:
        kept_before = self.left_out - np.arange(len(self.left_out))  # images that remain before each that does not
        return index + int(np.searchsorted(kept_before, index, side="right"))

    def count_before(self, positions: np.ndarray) -> np.ndarray | None:
        return positions - np.searchsorted(self.left_out, positions)


class Parts(NamedTuple):
    """Where the sources lie that were put together, int64 [parts + 1], and how often their images are visited."""

    bounds: np.ndarray
    weights: tuple[float, ...]


def find_parts(source: Source) -> Parts | None:
    """The parts of a source that are visited in other proportions than their sizes; None: there are none."""
    if isinstance(source, Subset):
        found = find_parts(source.source)
        bounds = None if found is None else source.count_before(found.bounds)
        return None if found is None or bounds is None else Parts(bounds, found.weights)
    return getattr(source, "parts", None)


def find_bounds(source: Source) -> np.ndarray | None:
    """The first positions of neighbors that are best read together, as those in a shard, and the end; None: of none."""
    if isinstance(source, Subset):
        found = find_bounds(source.source)
        return None if found is None else source.count_before(found)
    return getattr(source, "bounds", None)


def read_bytes(source: Source, index: int) -> bytes | None:
    """The image file at `index` as it is; None where a source has none, or one too large to be read whole."""
    read = getattr(source, "read_bytes", None)
    return None if read is None else read(index)


def read_ahead(source: Source, indices: Sequence[int]) -> None:
    """Tell a source what `read` or `read_bytes` will be asked for, where that takes a while."""
    if (begin := getattr(source, "read_ahead", None)) is not None:
        begin(indices)


def hold_out(source: Source, fraction: float, maximum: int, seed: int) -> tuple[Source, Source | None]:
    """Training images and min(maximum, round(fraction * n)) held-out ones, both in the order of `source`.

    At least one image stays for training. The second is None when nothing is held out. The choice depends on n and
    `seed` alone, whatever the version of NumPy.
    """
    count = min(maximum, round(fraction * len(source)), len(source) - 1)
    if count <= 0:
        return source, None
    if len(source) > MOST_LISTED:
        drawn = draw_words(Stream.HELD_OUT, seed, 2 * count) % np.uint64(len(source))
        held = np.sort(np.array([*dict.fromkeys(drawn.tolist())][:count]))
        return Remaining(source, held), Subset(source, held)
    order = np.argsort(draw_words(Stream.HELD_OUT, seed, len(source)), kind="stable")
    return Subset(source, np.sort(order[count:])), Subset(source, np.sort(order[:count]))


def open_source(
    spec: str | os.PathLike[str],
    labels: str = "auto",
    record: Path | None = None,
    trust: bool = False,
    reader: Reader | None = None,
) -> Files:
    """The images of a folder (searched at any depth, sorted by path) or of a list file (in the order of the list).

    A list is a .txt file (one path per line; '#' starts a comment line) or a .csv file (columns path and, if known,
    label); its paths are relative to it, and each counts once. Hidden files and folders, and those in which systems keep
    thumbnails or deleted files, are skipped. Links to folders are followed once, but not to a folder above this one.

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
    return Files(root, names, classes, indices, path, reader)


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


def evenly_spaced(total: int, most: int) -> Sequence[int]:
    """At most `most` evenly spaced positions of `total`."""
    return range(total) if total <= most else np.linspace(0, total - 1, most).astype(int).tolist()


def read_or_gray(source: Source, index: int) -> np.ndarray:
    """[h, w, 3] uint8: an image, or a gray square where it cannot be read."""
    try:
        return source.read(index)
    except BadImage:
        return np.full((64, 64, 3), 160, np.uint8)


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
