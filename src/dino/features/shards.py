"""The shards of an embedding, Parquet files: written, held to their format when they are read, and mapped into memory."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dino import errors, names
from dino.data import storage
from dino.features.extract import POOLINGS
from dino.terminal import track

# What the metadata of a shard may hold.
RULES: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("model", "model_sha256", "data", "data_sha256", "stamp"), lambda value: isinstance(value, str)),
    **dict.fromkeys(("images", "size", "shard", "shards"), lambda value: type(value) is int and 0 < value < 2**31),
    "pooling": lambda value: isinstance(value, str) and value in POOLINGS,
    "fp16": lambda value: isinstance(value, bool),
    "bad": lambda value: all([*map(type, entry)] == [str, str] for entry in value),
}
ROW_GROUP = 2**14  # rows; of more, PyArrow makes several pages
_NAME = re.compile(r"part-(\d+)\.parquet")
IDENTITY = ("model_sha256", "data_sha256", "stamp", "images", "pooling", "size", "fp16", "shard")


def import_parquet() -> Any:
    return errors.import_optional("pyarrow.parquet", "embeddings need PyArrow", "search")


class Damaged(ValueError):
    """A shard that cannot be read."""


def list_shards(folder: str) -> tuple[dict[int, str], list[str]]:
    """The paths of the shards in a folder by their numbers, in order, and the names of what else lies there."""
    names = sorted(storage.list_names(folder))
    numbers = {name: found[1] for name in names if (found := _NAME.fullmatch(name))}
    shards = {int(number): f"{folder.rstrip('/')}/{name}" for name, number in numbers.items()}
    return shards, [name for name in names if name not in numbers]


def _read_footer(path: str) -> tuple[Any, int]:
    """The schema and the number of rows of a shard.

    Raises:
        ValueError: it is not there, cannot be read, or is `Damaged`.
    """
    pq = import_parquet()

    def read(file: Any) -> tuple[Any, int] | None:
        try:
            with pq.ParquetFile(file) as opened:
                return opened.schema_arrow, opened.metadata.num_rows
        except (OSError, ValueError) as error:  # PyArrow says either of what it cannot parse, without a number
            if getattr(error, "errno", None) is not None:
                raise
            return None

    try:
        found = storage.ask_of_file(path, read) if storage.is_remote(path) else read(path)
    except FileNotFoundError as error:
        raise names.no_embedding(path) from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}).") from error
    if found is None:
        raise Damaged(f"{path} is damaged or cut short; the same `dino embed` again makes it anew.")
    return found


def read_about(path: str) -> dict[str, Any]:
    """Metadata of a shard, and its number of `rows` and the length `dim` of a feature (None: the lengths differ)."""
    schema, rows = _read_footer(path)
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


def read_all(paths: Sequence[str]) -> Iterator[dict[str, Any] | Damaged]:
    """`read_about` of many shards, several at a time; what is damaged is not raised."""

    def read(path: str) -> dict[str, Any] | Damaged:
        try:
            return read_about(path)
        except Damaged as error:
            return error

    with ThreadPoolExecutor(16) as pool:
        yield from track(pool.map(read, paths), len(paths), "shards")


def name_ranges(numbers: Sequence[int]) -> str:
    """ "0-3, 7" of 0, 1, 2, 3 and 7."""
    runs = np.split(np.array(numbers), np.flatnonzero(np.diff(numbers) > 1) + 1)
    named = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join([*named[:10], *["..."] * (len(named) > 10)])


def name_command(about: dict[str, Any], where: str | Path) -> str:
    """The command that writes the shards of an embedding that are missing."""
    words = ["dino", "embed", about["model"] or "MODEL", about["data"] or "DATA", "--out", str(where)]
    words += ["--pooling", about["pooling"]] if about["pooling"] != "cls" else []
    words += ["--size", str(about["size"]), *["--fp16"] * about["fp16"], "--shard", str(about["shard"])]
    return shlex.join(words)


def write_shard(path: str, columns: dict[str, np.ndarray], features: np.ndarray, about: dict[str, Any]) -> None:
    """Write a shard, whole or not at all: its columns, the features [n, d] as `map_features` finds them, and its metadata."""
    import pyarrow as pa

    arrays = {name: pa.array(column, pa.string() if name == "path" else None) for name, column in columns.items()}
    arrays["feature"] = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])
    about |= {"feature_sha256": hashlib.sha256(features.data).hexdigest()}
    table = pa.table(arrays).replace_schema_metadata({"dino": json.dumps(about)})
    layout = {"compression": dict.fromkeys(columns, "snappy"), "data_page_size": 2**30, "row_group_size": ROW_GROUP}
    layout |= {"use_dictionary": ["path"], "write_page_checksum": True}
    import_parquet().write_table(table, content := io.BytesIO(), **layout)
    storage.write_file(path, content.getvalue())


def map_features(file: str, dim: int) -> list[np.ndarray] | None:
    """The features of a shard, [n, dim] in each of its row groups, mapped from the file; None: they do not lie in one piece.

    `embed` writes the features of a row group as one page that is not compressed: a header, levels that say which values
    are there, and the values as they are in memory. So they are the end of their column's bytes.
    """
    about, pieces = import_parquet().read_metadata(file), []
    kinds = {"FLOAT": np.dtype("<f4"), "FIXED_LEN_BYTE_ARRAY": np.dtype("<f2")}
    with open(file, "rb") as opened:
        for group in map(about.row_group, range(about.num_row_groups)):
            columns = map(group.column, range(group.num_columns))
            column = next(each for each in columns if each.path_in_schema.startswith("feature."))
            raw = column.compression == "UNCOMPRESSED"
            plain = raw and not column.has_dictionary_page and "PLAIN" in column.encodings
            values, statistics = group.num_rows * dim, column.statistics
            if column.physical_type not in kinds or not plain or statistics is None or statistics.null_count:
                return None
            kind = kinds[column.physical_type]
            opened.seek(column.data_page_offset)
            if not _is_one_page(opened.read(16), column.total_compressed_size):
                return None
            offset = column.data_page_offset + column.total_compressed_size - values * kind.itemsize
            pieces.append(np.memmap(file, kind, "r", offset, (group.num_rows, dim)))
    return pieces


def _is_one_page(start: bytes, size: int) -> bool:
    """Whether a column of `size` bytes is one page, by the `start` of its header: a kind (0) and a size, in Thrift's form."""
    length, shift = 0, 0
    for byte in start[3:]:
        length |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    return start[:3] == b"\x15\0\x15" and 0 < size - length // 2 < 100  # the rest is the header; numbers are in zigzag
