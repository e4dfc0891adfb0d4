"""Reading what `embed` wrote: shards that are held to its format, and their features in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino import errors
from dino.data.open import open_images
from dino.data.sources import Source
from dino.features.extract import POOLINGS

# What the metadata of a shard may hold.
RULES: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("model", "model_sha256", "data", "data_sha256", "stamp"), lambda value: isinstance(value, str)),
    **dict.fromkeys(("images", "size", "shard", "shards"), lambda value: type(value) is int and 0 < value < 2**31),
    "pooling": lambda value: isinstance(value, str) and value in POOLINGS,
    "fp16": lambda value: isinstance(value, bool),
    "bad": lambda value: all([*map(type, entry)] == [str, str] for entry in value),
}
IDENTITY = ("model_sha256", "data_sha256", "stamp", "images", "pooling", "size", "fp16", "shard")


def import_parquet() -> Any:
    return errors.import_optional("pyarrow.parquet", "embeddings need PyArrow", "search")


class Damaged(ValueError):
    """A shard that cannot be read."""


def read_about(path: Path) -> dict[str, Any]:
    """Metadata of a shard, and its number of `rows` and the length `dim` of a feature (None: the lengths differ)."""
    pq = import_parquet()
    try:
        with pq.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
    except FileNotFoundError as error:
        raise ValueError(
            f"there is no embedding '{path}'; write one with: dino embed MODEL DATA --out x.parquet"
        ) from error
    except OSError as error:  # ArrowInvalid is a ValueError
        raise ValueError(f"{path} cannot be read ({error}).") from error
    except ValueError as error:
        raise Damaged(f"{path} is damaged or cut short; the same `dino embed` again makes it anew.") from error
    if b"dino" not in (schema.metadata or {}):
        raise ValueError(f"{path} is no embedding that `dino embed` wrote; give one.")
    try:
        about = json.loads(schema.metadata[b"dino"])
        if not about.keys() >= set(IDENTITY):
            raise ValueError(f"{path} was written by another version of dino; embed anew.")
        wrong = [key for key, allows in RULES.items() if not allows(about[key])]
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} holds damaged metadata ({errors.first_line(error)}); embed anew.") from error
    wrong += [
        name
        for name, allows in _list_columns().items()
        if schema.names.count(name) != 1 or not allows(schema.field(name).type)
    ]
    if wrong:
        raise ValueError(f"{path} is damaged or altered: its {wrong[0]} is not as `dino embed` writes it; embed anew.")
    return about | {"rows": rows, "dim": getattr(schema.field("feature").type, "list_size", None)}


def _list_columns() -> dict[str, Callable[[Any], bool]]:
    """Columns of a shard, and which types they may have. The lengths of features are looked at by whoever reads several."""
    import pyarrow.types as kind

    def holds_floats(column: Any) -> bool:
        lists = kind.is_fixed_size_list(column) or kind.is_list(column) or kind.is_large_list(column)
        return lists and kind.is_floating(column.value_type) and getattr(column, "list_size", 1) > 0

    return {
        "path": lambda column: kind.is_string(column) or kind.is_large_string(column),
        "index": kind.is_integer,
        "feature": holds_floats,
    }


@dataclass(frozen=True)
class Folder:
    """A complete embedding on disk. Its features are not read yet."""

    path: Path
    files: list[Path]
    about: dict[str, Any]  # metadata, see docs/using-features.md
    rows: int
    dim: int
    bad: list[tuple[str, str]]  # name and reason of each image that could not be read

    @classmethod
    def open(cls, path: str | Path) -> Folder:
        """An embedding from a folder of shards, or from a single shard.

        Raises:
            ValueError: there is none; or it is incomplete or damaged, or mixes several models or lengths of features.
        """
        path = Path(path).expanduser()
        files = sorted(path.glob("*.parquet")) if os.path.isdir(path) else [path]
        if not files:
            raise ValueError(f"{path} holds no embedding; write one with: dino embed MODEL DATA --out {path}")
        held = [read_about(file) for file in files]
        dims = {about["dim"]: file.name for about, file in zip(held, files, strict=True)}
        if len(dims) > 1 or None in dims:
            lengths = " and ".join(str(dim or "varying") for dim in dims)
            raise ValueError(
                f"{path} mixes features of different lengths ({lengths}, {[*dims.values()][-1]}); embed anew."
            )
        for about, file in zip(held, files, strict=True):
            if differs := [key for key in IDENTITY if about[key] != held[0][key]]:
                raise ValueError(f"{file} is of another embedding than {files[0].name} ({differs[0]}); embed anew.")
        if os.path.isdir(path) and len(files) < held[0]["shards"]:
            raise ValueError(
                f"{path} is incomplete, {len(files)} of {held[0]['shards']} shards; the same `dino embed` again completes it."
            )
        bad = [(name, reason) for about in held for name, reason in about["bad"]]
        return cls(path, files, held[0], sum(about["rows"] for about in held), held[0]["dim"], bad)

    def read(self) -> Embedding:
        """The embedding in memory.

        Raises:
            ValueError: a shard is damaged or altered, there are no features or not finite ones, or they are of patches.
        """
        if self.about["pooling"] == "patches":
            raise ValueError(
                f"{self.path} holds features of patches, but images are compared; embed with another --pooling."
            )
        if not self.rows:
            raise ValueError(f"{self.path} holds no features, because none of its images could be read; embed others.")
        values, names, positions, start = torch.empty(self.rows, self.dim), [], [], 0
        for file in self.files:
            try:
                table = import_parquet().read_table(file, partitioning=None, page_checksum_verification=True)
            except (ValueError, OSError) as error:
                raise Damaged(
                    f"{file} is damaged or cut short; delete it, and the same `dino embed` makes it anew."
                ) from error
            column, index = table["feature"].combine_chunks(), table["index"].to_numpy()
            if any(part.null_count for part in (*table.columns, column.flatten())):
                raise ValueError(f"{file} is damaged or altered: it holds empty values; embed anew.")
            if index.min(initial=0) < 0 or index.max(initial=0) >= self.about["images"]:
                raise ValueError(f"{file} is damaged or altered: it names images outside of its data; embed anew.")
            flat = column.flatten().to_numpy(zero_copy_only=False)
            values[start : start + len(table)] = torch.from_numpy(flat.reshape(-1, self.dim).copy())
            start += len(table)
            names += table["path"].to_pylist()
            positions.append(index)
        if not values.isfinite().all():
            raise ValueError(
                f"{self.path} holds features that are not finite (NaN or infinity), made by the model "
                f"{self.about['model'] or self.about['model_sha256'][:12]}; embed with a sound one."
            )
        norms = torch.linalg.vector_norm(values, dim=1, keepdim=True).clamp(min=1e-12)
        return Embedding(self, names, np.concatenate(positions), values.div_(norms))


@dataclass(frozen=True)
class Embedding:
    """Features in memory."""

    folder: Folder
    names: list[str]
    positions: np.ndarray  # [n] in the data
    values: Tensor  # [n, d] float32, of length 1

    def images(self) -> Source:
        """The images it was made from.

        Raises:
            ValueError: they are gone or have changed.
        """
        if not self.folder.about["data"]:
            raise ValueError(f"{self.folder.path} does not say where its images lie, so there is no page of them.")
        source = open_images(self.folder.about["data"])
        if source.fingerprint != self.folder.about["data_sha256"]:
            raise ValueError(
                f"the images of {self.folder.about['data']} are no longer those of {self.folder.path}; embed them anew."
            )
        return source
