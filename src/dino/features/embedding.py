"""An embedding as others see it: a folder that is whole, and its features, in memory or mapped from its shards."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino.data import storage
from dino.data.open import open_images
from dino.data.sources import Source
from dino.features import shards

T = TypeVar("T", covariant=True)


@dataclass(frozen=True, repr=False)
class Folder:
    """An embedding on disk, or in an object store. Its features are not read yet."""

    where: str | Path
    files: list[str]
    about: dict[str, Any]  # metadata, see docs/using-features.md
    rows: int
    dim: int
    bad: list[tuple[str, str]]  # name and reason of each image that could not be read
    missing: Sequence[int] = ()  # numbers of the shards that are not written yet
    digest: str = ""  # of all features

    def __repr__(self) -> str:
        return f"Folder({os.fspath(self.where)!r}: {self.rows:,} features of {self.dim} numbers)"

    @property
    def path(self) -> Path:
        """Where it lies on the disk.

        Raises:
            ValueError: it lies elsewhere.
        """
        require_disk(self.where)
        return Path(self.where)

    @classmethod
    def open(cls, where: str | Path, whole: bool = True) -> Folder:
        """An embedding from a folder of shards, or from a single shard.

        Args:
            whole: False: shards may be missing, and it may lie in an object store.

        Raises:
            ValueError: there is none; or it is incomplete or damaged, or mixes several models or lengths of features.
        """
        if whole:
            require_disk(where)
        where = where if storage.is_remote(where) else Path(where).expanduser()
        is_folder = storage.is_remote(where) or os.path.isdir(where)
        parts = shards.list_shards(str(where))[0] if is_folder else {0: str(where)}
        if not parts:
            raise ValueError(f"{where} holds no embedding; write one with: dino embed MODEL DATA --out {where}")
        held, files = [], [*parts.values()]
        for about in shards.read_all(files):
            if isinstance(about, shards.Damaged):
                raise about
            held.append(about)
        _require_alike(where, files, held)
        missing = [number for number in range(held[0]["shards"]) if number not in parts] if is_folder else []
        if missing and whole:
            raise ValueError(
                f"{where} is incomplete, {len(files)} of {held[0]['shards']} shards (missing: "
                f"{shards.name_ranges(missing)}); complete it with: {shards.name_command(held[0], where)}"
            )
        bad = [(name, reason) for about in held for name, reason in about["bad"]]
        digest = hashlib.sha256(repr([_identify(*each) for each in zip(files, held, strict=True)]).encode()).hexdigest()
        rows = sum(about["rows"] for about in held)
        return cls(where, files, held[0], rows, held[0]["dim"], bad, missing, digest)

    def require_images(self) -> None:
        """Refuse an embedding that has no features of whole images.

        Raises:
            ValueError: it holds none, or those of patches.
        """
        if self.about["pooling"] == "patches":
            raise ValueError(
                f"{self.path} holds features of patches, but images are compared; embed with another --pooling."
            )
        if not self.rows:
            raise ValueError(f"{self.path} holds no features, because none of its images could be read; embed others.")

    def require_finite(self, values: Tensor) -> None:
        """Refuse features that are no numbers."""
        if not values.isfinite().all():
            raise ValueError(
                f"{self.path} holds features that are not finite (NaN or infinity), made by the model "
                f"{self.about['model'] or self.about['model_sha256'][:12]}; embed with a sound one."
            )

    def read_shard(self, file: str) -> tuple[Any, np.ndarray]:
        """A shard as a table, and its features [n, d].

        Raises:
            ValueError: it is damaged or altered.
        """
        try:
            table = shards.import_parquet().read_table(file, partitioning=None, page_checksum_verification=True)
        except (ValueError, OSError) as error:
            raise shards.Damaged(
                f"{file} is damaged or cut short; delete it, and the same `dino embed` makes it anew."
            ) from error
        column, index = table["feature"].combine_chunks(), table["index"].to_numpy()
        if any(part.null_count for part in (*table.columns, column.flatten())):
            raise ValueError(f"{file} is damaged or altered: it holds empty values; embed anew.")
        if index.min(initial=0) < 0 or index.max(initial=0) >= self.about["images"]:
            raise ValueError(f"{file} is damaged or altered: it names images outside of its data; embed anew.")
        return table, column.flatten().to_numpy(zero_copy_only=False).reshape(-1, self.dim)

    def read(self) -> Embedding:
        """The embedding in memory.

        Raises:
            ValueError: a shard is damaged or altered, there are no features or not finite ones, or they are of patches.
        """
        self.require_images()
        values, names, positions, start = torch.empty(self.rows, self.dim), [], [], 0
        for file in self.files:
            table, features = self.read_shard(file)
            values[start : start + len(table)] = torch.from_numpy(features.copy())
            start += len(table)
            names += table["path"].to_pylist()
            positions.append(table["index"].to_numpy())
        self.require_finite(values)
        norms = torch.linalg.vector_norm(values, dim=1, keepdim=True).clamp(min=1e-12)
        return Embedding(self, names, np.concatenate(positions), values.div_(norms))

    def images(self) -> Source:
        """The images it was made from.

        Raises:
            ValueError: they are gone or have changed.
        """
        if not self.about["data"]:
            raise ValueError(f"{self.path} does not say where its images lie, so there is no page of them.")
        source = open_images(self.about["data"])
        if source.fingerprint != self.about["data_sha256"]:
            raise ValueError(f"the images of {self.about['data']} are no longer those of {self.path}; embed them anew.")
        return source


@dataclass(frozen=True, repr=False)
class Embedding:
    """Features in memory."""

    folder: Folder
    names: Sequence[str]
    positions: np.ndarray  # [n] in the data
    values: Tensor  # [n, d] float32, of length 1

    def __repr__(self) -> str:
        return f"Embedding in memory of {self.folder!r}"

    def __len__(self) -> int:
        return len(self.values)

    def take(self, rows: Sequence[int] | np.ndarray) -> Tensor:
        """The features of `rows` [n, d], of length 1."""
        return self.values[torch.as_tensor(rows, dtype=torch.int64)]

    def iterate(self, count: int) -> Iterator[Tensor]:
        """All features in order, of length 1, about `count` rows at a time."""
        yield from self.values.split(count)


class Rows(Protocol):
    """Features of images with their names, in memory or on the disk."""

    @property
    def folder(self) -> Folder: ...
    @property
    def names(self) -> _Listed[str]: ...
    @property
    def positions(self) -> _Listed[int]: ...  # in the data

    def __len__(self) -> int: ...

    def take(self, rows: Sequence[int] | np.ndarray) -> Tensor:
        """The features of `rows`, [n, d] float32 of length 1."""
        ...

    def iterate(self, count: int) -> Iterator[Tensor]:
        """All features in their order, about `count` rows at a time."""
        ...


class _Listed(Protocol[T]):
    def __getitem__(self, row: int, /) -> T: ...


class _Column(Generic[T]):
    def __init__(self, get: Callable[[int], T]):
        self.get = get

    def __getitem__(self, row: int) -> T:
        return self.get(row)


class Mapped:
    """Features that stay on the disk: what is asked for is read, and the system keeps in memory what it has room for.

    Raises:
        ValueError: there are no features of images, or a shard that must be read whole is damaged.
    """

    def __init__(self, folder: Folder):
        folder.require_images()
        self.folder = folder
        pieces = [shards.map_features(file, folder.dim) or [folder.read_shard(file)[1]] for file in folder.files]
        self.pieces = [piece for each in pieces for piece in each]
        self.starts = np.cumsum([0, *map(len, self.pieces)])
        self.bounds = np.cumsum([0, *(sum(map(len, each)) for each in pieces)])  # of the files
        self.names = _Column(lambda row: self._read_cell("path", row))
        self.positions = _Column(lambda row: self._read_cell("index", row))
        self._read_column = functools.lru_cache(maxsize=64)(self._load_column)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _load_column(self, number: int, name: str) -> Any:
        return shards.import_parquet().read_table(self.folder.files[number], columns=[name], partitioning=None)[name]

    def _read_cell(self, name: str, row: int) -> Any:
        number = int(np.searchsorted(self.bounds, row, side="right")) - 1
        return self._read_column(number, name)[int(row - self.bounds[number])].as_py()

    def take(self, rows: Sequence[int] | np.ndarray) -> Tensor:
        rows = np.asarray(rows, np.int64)
        values = np.empty((len(rows), self.folder.dim), np.float32)
        numbers = np.searchsorted(self.starts, rows, side="right") - 1
        order = np.argsort(numbers, kind="stable")
        for at in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1) if len(rows) else ():
            number = numbers[at[0]]
            values[at] = self.pieces[number][rows[at] - self.starts[number]]
        return self._normalize(values)

    def iterate(self, count: int) -> Iterator[Tensor]:
        held: list[np.ndarray] = []
        for piece in self.pieces:
            held.append(piece)
            if sum(map(len, held)) >= count or piece is self.pieces[-1]:
                yield self._normalize(np.concatenate(held, dtype=np.float32))
                held = []

    def _normalize(self, values: np.ndarray) -> Tensor:
        found = torch.from_numpy(values)
        self.folder.require_finite(found)
        return F.normalize(found, dim=1)


def require_disk(where: str | Path) -> None:
    if storage.is_remote(where):
        raise ValueError(
            f"{where} lies elsewhere, and features are read from a disk; copy the folder and give the copy."
        )


def _require_alike(where: str | Path, files: Sequence[str], held: Sequence[dict[str, Any]]) -> None:
    dims = {about["dim"]: os.path.basename(file) for about, file in zip(held, files, strict=True)}
    if len(dims) > 1 or None in dims:
        lengths = " and ".join(str(dim or "varying") for dim in dims)
        raise ValueError(
            f"{where} mixes features of different lengths ({lengths}, {[*dims.values()][-1]}); embed anew."
        )
    for about, file in zip(held, files, strict=True):
        if differs := [key for key in shards.IDENTITY if about[key] != held[0][key]]:
            raise ValueError(
                f"{file} is of another embedding than {os.path.basename(files[0])} ({differs[0]}); embed anew."
            )


def _identify(file: str, about: dict[str, Any]) -> str:
    """A text that is another one where a shard has other features."""
    return str(about.get("feature_sha256") or storage.describe(file))


AnyEmbedding = str | Path | Folder | Rows  # where it lies, or what `dino.embed` gives, or its rows


def open_whole(embedding: AnyEmbedding) -> Folder:
    """An embedding that is whole.

    Raises:
        ValueError: it is not, or this is none.
    """
    where = embedding.where if isinstance(embedding, Folder) else embedding
    if not isinstance(where, str | Path):
        raise ValueError(f"a {type(where).__name__} is no embedding; give what dino.embed returned, or its path.")
    return Folder.open(where)
