"""Where each image of many shards lies: its name, shard, place in it and label, in files that are mapped into memory.

Each shard is read once, by worker processes, into a file of its own. So an indexing that was interrupted goes on, and of
shards that have changed only those are read again. The files of all shards are then joined. Both lie in a hidden folder
beside the shards, or in the cache where that cannot be written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import lock_descriptor
from torch.utils.data import Dataset

from dino import files
from dino.data.labels import sort_classes
from dino.data.listing import Names
from dino.data.loader import iterate
from dino.data.tar import Entry
from dino.machine import count_cores
from dino.terminal import track

_VERSION = 1  # of the files' format
_FOLDER = ".dino-index"  # beside the shards


class Shard(NamedTuple):
    path: str
    name: str  # what people see
    version: str  # another one after the file has changed

    @property
    def key(self) -> str:
        """A file name for what is known of it, which begins alike whatever the version."""
        return f"{_hash(self.name)}-{_hash(f'{_VERSION} {self.version}')}"


class Index:
    """The images of shards, by position. It opens at once, whatever their number.

    Attributes:
        shards: where the shards are, as absolute paths.
        names: of the images within their shards.
        bounds: int64 [shards + 1], the position of each shard's first image, and the number of all.
        offsets, lengths: int64 [n], bytes.
        labels: int64 [n], -1 where unknown; None: there are none.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard]):
        self.folder, self.shards = folder, shards
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        self.classes, self.fingerprint = tuple(about["classes"]), about["fingerprint"]
        self.bounds = np.load(folder / "bounds.npy")
        columns = ("starts", "offsets", "lengths", "labels")
        starts, self.offsets, self.lengths, labels = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in columns
        )
        self.labels = labels if self.classes else None
        with (folder / "names").open("rb") as file:
            self.names = Names.mapped(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), starts)

    def __reduce__(self) -> tuple[Any, ...]:
        return Index, (self.folder, self.shards)  # another process opens the files itself

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def find_shard(self, position: int) -> int:
        return int(np.searchsorted(self.bounds, position, side="right")) - 1


def open_index(shards: Sequence[Shard], read: Callable[[Shard], Iterable[Entry]]) -> Index:
    """The index of the `shards`, made if there is none of them as they are now.

    Args:
        read: the images of one shard. A worker process calls it.

    Raises:
        ValueError: a shard cannot be read, or there is no image in any.
    """
    place = _find_place(shards)
    joined = Shard("", "\n".join(s.name for s in shards), "\n".join(s.version for s in shards))
    folder = place / joined.key
    place.mkdir(parents=True, exist_ok=True)
    with _alone(place):  # ranks that ask for the same wait for the first
        if not (folder / "about.json").is_file():
            _read_shards(shards, place, read)
            _join(shards, place, folder)
    return Index(folder, shards)


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """One process at a time, where the system can tell."""
    with (place / "lock").open("w") as file:
        with contextlib.suppress(OSError):  # not every network drive has locks
            lock_descriptor(file.fileno(), blocking=True)
        yield


def _find_place(shards: Sequence[Shard]) -> Path:
    beside = Path(os.path.dirname(shards[0].path))
    return beside / _FOLDER if os.access(beside, os.W_OK) else files.cache_folder() / "indexes"


# --- one shard -----------------------------------------------------------------------------------------------------


class _Reading(Dataset[str]):
    """Item i reads shard i and writes what is in it to its file; it is what went wrong, or ""."""

    def __init__(self, shards: Sequence[Shard], place: Path, read: Callable[[Shard], Iterable[Entry]]):
        self.shards, self.place, self.read = shards, place, read

    def __getitem__(self, number: int) -> str:
        try:
            _save(self.place, self.shards[number], list(self.read(self.shards[number])))
        except ValueError as error:
            return str(error)
        return ""


def _read_shards(shards: Sequence[Shard], place: Path, read: Callable[[Shard], Iterable[Entry]]) -> None:
    """Write the file of every shard that has none yet."""
    missing = [shard for shard in shards if not _get_file(place, shard).is_file()]
    workers = min(count_cores(), len(missing)) if len(missing) > 1 else 0
    reading = iterate(_Reading(missing, place, read), 0, len(missing), workers, pin_memory=False)
    for error in track(reading, len(missing), "indexing shards"):
        if error:
            raise ValueError(error)


def _get_file(place: Path, shard: Shard) -> Path:
    return place / f"{shard.key}.npz"


def _save(place: Path, shard: Shard, entries: Sequence[Entry]) -> None:
    names, labels = Names(entry.name for entry in entries), [entry.label for entry in entries]
    if not any(labels):  # then the first folder level, as of folders of images
        labels = [entry.name.partition("/")[0] if "/" in entry.name else None for entry in entries]
    vocabulary = sort_classes({label for label in labels if label is not None})
    position: dict[str | None, int] = {label: i for i, label in enumerate(vocabulary)}
    file = _get_file(place, shard)
    with files.replacing(file) as temporary, temporary.open("wb") as stream:
        np.savez(
            stream,
            names=np.frombuffer(names.blob, np.uint8),
            offsets=np.array([entry.offset for entry in entries], np.int64),
            lengths=np.array([entry.length for entry in entries], np.int64),
            codes=np.array([position.get(label, -1) for label in labels], np.int64),
            vocabulary=np.frombuffer(json.dumps(vocabulary).encode(), np.uint8),
        )
    _remove_older(file)


def _remove_older(path: Path) -> None:
    """Delete what is known of an earlier version."""
    for other in path.parent.glob(path.name.partition("-")[0] + "-*"):
        if other != path:
            shutil.rmtree(other) if other.is_dir() else other.unlink(missing_ok=True)


# --- all shards ----------------------------------------------------------------------------------------------------


def _join(shards: Sequence[Shard], place: Path, folder: Path) -> None:
    """Write the files of `Index` into `folder`, all or nothing. Memory: what one shard needs."""
    counts, classes = [], set()
    for shard in shards:
        with np.load(_get_file(place, shard)) as part:
            counts.append(len(part["offsets"]))
            classes |= {*json.loads(part["vocabulary"].tobytes())}
    total = sum(counts)
    if not total:
        raise ValueError(
            f"{shards[0].name} holds no image{f', nor do {len(shards) - 1} others' if shards[1:] else ''}."
        )
    named = sort_classes(classes) if 2 <= len(classes) <= total / 2 else ()
    bounds, digest = np.cumsum([0, *counts]), hashlib.sha256()
    with files.naming(place), tempfile.TemporaryDirectory(dir=place, prefix=".") as temporary:
        new = Path(temporary) / "index"
        new.mkdir()
        starts, *columns = (
            np.lib.format.open_memmap(new / f"{name}.npy", "w+", np.int64, (total + (name == "starts"),))
            for name in ("starts", "offsets", "lengths", "labels")
        )
        with (new / "names").open("wb") as names:
            for shard, first, end in zip(shards, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
                with np.load(_get_file(place, shard)) as part:
                    blob = part["names"]
                    labels = _translate(part["codes"], json.loads(part["vocabulary"].tobytes()), named)
                    starts[first + 1 : end + 1] = names.tell() + 1 + np.flatnonzero(blob == 0)
                    for column, values in zip(columns, (part["offsets"], part["lengths"], labels), strict=True):
                        column[first:end] = values
                    names.write(blob.tobytes())
                digest.update(_hash(shard.name).encode() + hashlib.sha256(blob).digest() + labels.tobytes())
        for column in (starts, *columns):
            column.flush()
        np.save(new / "bounds.npy", bounds)
        digest.update(json.dumps(named).encode())
        about = {"classes": named, "fingerprint": digest.hexdigest()}
        (new / "about.json").write_text(json.dumps(about), encoding="utf-8")
        with contextlib.suppress(OSError):  # another machine may have been as fast
            new.rename(folder)
    _remove_older(folder)


def _translate(codes: np.ndarray, vocabulary: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """A shard's own numbers of labels as those among the `classes` of all, int64, -1 where unknown."""
    position = {name: number for number, name in enumerate(classes)}
    return np.array([position.get(name, -1) for name in (*vocabulary, "")], np.int64)[codes]


def _hash(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:24]
