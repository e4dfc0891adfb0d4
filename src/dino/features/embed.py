"""Features of many images on disk: a folder of Parquet shards, each written once and whole, by any number of ranks.

A shard holds the rows of a fixed range of positions in the source, so it does not matter which rank writes it, and when.
After a crash only the missing shards are computed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dino import distributed, errors, files, weights
from dino.data.normalize import normalize
from dino.data.open import open_images
from dino.data.sources import Source
from dino.data.specs import make_absolute
from dino.features.extract import Features, Pooling, choose_batch_size, extract_batches, find_pooling
from dino.features.shards import IDENTITY, Damaged, Folder, import_parquet, read_about
from dino.models import Backbone
from dino.options.commands import EmbedOptions
from dino.options.rules import checked
from dino.version import __version__
from dino.weights import fingerprint, runs

SHARD, MOST_VALUES = 4096, 2**24  # most images of a shard, and most numbers: 64 MB


@checked(EmbedOptions, "model", "data", "out", "size", "fp16", "shard", "device")
def embed(
    model: str | os.PathLike[str] | Backbone,
    data: str | os.PathLike[str] | Source,
    out: str | os.PathLike[str],
    pooling: Pooling = "cls",
    size: int | None = None,
    fp16: bool = False,
    shard: int | None = None,
    device: str = "auto",
) -> Folder:
    """Write features of all readable images of `data` to the folder `out`, or only those that it does not hold yet.

    Its Parquet files have columns path, index (position in the data), feature [d], and `patch` (row by row) where the
    features are of patches. Under torchrun all ranks call this, and each writes its share.

    Args:
        model: what `dino.load` takes, or a model, used on its device.
        size: edge of the evaluation view, pixels. None: what the model was made for.
        fp16: store half precision, and compute in it on a GPU.
        shard: images of a shard, rounded up to whole batches. A crash loses one shard at most. None: 4096, fewer of
            patches.

    Raises:
        ValueError: `out` holds another embedding or something else, or no image can be read.
    """
    pq = import_parquet()
    model = os.fspath(model) if isinstance(model, os.PathLike) else model
    data = os.fspath(data) if isinstance(data, os.PathLike) else data
    pool = find_pooling(pooling)
    network = weights.load(model).to(distributed.start(device)) if isinstance(model, str) else model
    source, size = open_images(data) if isinstance(data, str) else data, size or network.view_size
    blank = torch.zeros(1, 1, size, size, 3, dtype=torch.uint8, device=next(network.parameters()).device)
    with torch.no_grad():
        shape = pool(network, normalize(blank, network.preprocessing)).shape[1:]  # [d] or [p, d]
    shard = shard or max(1, min(SHARD, MOST_VALUES // shape.numel()))
    batch = min(choose_batch_size(size), shard)
    shard = -(-shard // batch) * batch
    name = runs.make_absolute(model) if isinstance(model, str) else ""
    place = make_absolute(data) if isinstance(data, str) else ""
    folder = Path(out).expanduser()
    about = {"model": name, "model_sha256": fingerprint(network), "data": place, "data_sha256": source.fingerprint}
    about |= {"stamp": source.stamp(), "images": len(source), "pooling": pooling, "size": size, "fp16": fp16}
    about |= {"shard": shard, "shards": -(-len(source) // shard), "version": __version__}
    missing = distributed.from_main(lambda: _missing(folder, about))
    mine = missing[distributed.rank() :: distributed.world_size()]
    positions = [i for part in mine for i in range(part * shard, min((part + 1) * shard, len(source)))]
    batches = extract_batches(network, source, size, positions, batch, None, "embed", pooling, fp16=fp16)
    for part in mine:
        # Only the last shard has fewer batches, and it is the last of `mine`.
        table = _table([*islice(batches, shard // batch)], source, shape, about)
        with files.replacing(folder / f"part-{part:06d}.parquet", flush=True) as temporary:
            pq.write_table(table, temporary, use_dictionary=["path"], write_page_checksum=True)
    distributed.barrier()
    written = Folder.open(folder)
    if not written.rows:
        raise ValueError(
            f"none of the {len(source)} images can be read, first {': '.join(written.bad[0])}; give others."
        )
    return written


def _missing(folder: Path, about: dict[str, Any]) -> list[int]:
    """Numbers of the shards to write. Makes the folder and removes files that a killed process left unfinished."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.sweep(folder)
    except OSError as error:
        raise errors.unwritable(folder, error) from error
    missing = set(range(about["shards"]))
    for path in folder.iterdir():
        number = path.stem.removeprefix("part-")
        if path.suffix != ".parquet" or not number.isdecimal():
            raise ValueError(
                f"--out {folder} holds {path.name}, which is no part of an embedding; choose another --out."
            )
        try:
            held = read_about(path)
        except Damaged:
            continue  # it is written again
        for key in IDENTITY:
            if held.get(key) != about[key]:
                raise ValueError(
                    f"--out {folder} holds another embedding, whose {key} is {str(held.get(key))[:12]} and not "
                    f"{str(about[key])[:12]}; choose another --out, or delete it."
                )
        missing.discard(int(number))
    return sorted(missing)


def _table(found: list[Features], source: Source, shape: Sequence[int], about: dict[str, Any]) -> Any:
    import pyarrow as pa

    values, positions, bad = Features.concatenate(found, *shape)
    each = shape[0] if len(shape) == 2 else 1  # rows of an image
    names = [os.fsencode(source.name(i)).decode("utf-8", "replace") for i in positions.tolist()]
    columns = {"path": np.repeat(np.array(names, object), each), "index": np.repeat(positions, each)}
    if len(shape) == 2:
        columns["patch"] = np.tile(np.arange(each, dtype=np.int32), len(positions))
    flat = values.numpy().astype(np.float16 if about["fp16"] else np.float32).reshape(-1)
    arrays = {name: pa.array(column, pa.string() if name == "path" else None) for name, column in columns.items()}
    arrays["feature"] = pa.FixedSizeListArray.from_arrays(pa.array(flat), shape[-1])
    return pa.table(arrays).replace_schema_metadata({"dino": json.dumps(about | {"bad": bad})})
