"""Features of many images: a folder of Parquet shards, each written once and whole, by any number of ranks and jobs.

A shard holds the rows of a fixed range of positions in the source, so it does not matter who writes it, and when. Two that
write the same one write the same, and the later file replaces the other. After a crash only the missing shards are computed.
"""

from __future__ import annotations

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
from dino.data.storage import is_probe, is_remote, require_writable
from dino.features.embedding import Folder
from dino.features.extract import POOLINGS, Features, Pooling, choose_batch_size, extract_batches
from dino.features.shards import IDENTITY, Damaged, import_parquet, list_shards, read_all, write_shard
from dino.models import Backbone
from dino.options import required
from dino.options.commands import EmbedOptions
from dino.options.rules import checked, parse_part
from dino.version import __version__
from dino.weights import fingerprint, runs

SHARD, MOST_VALUES = 4096, 2**24  # images of a shard, and most numbers: 64 MB
# Other parts may be at work: only a file that was not written to for so many seconds was left by a killed process.
ABANDONED = 3600


@checked(EmbedOptions, "model", "data", "out", "size", "fp16", "shard", "part", "device")
def embed(
    model: str | os.PathLike[str] | Backbone,
    data: str | os.PathLike[str] | Source,
    out: str | os.PathLike[str],
    pooling: Pooling = "cls",
    size: int | None = None,
    fp16: bool = False,
    shard: int | None = None,
    part: str | None = None,
    device: str = "auto",
) -> Folder:
    """Write features of all readable images of `data` to the folder `out`, or only those that it does not hold yet.

    Its Parquet files have columns path, index (position in the data), feature [d], and `patch` (row by row) where the
    features are of patches. Under torchrun all ranks call this, and each writes its share.

    Args:
        model: what `dino.load` takes, or a model, used on its device.
        out: a folder on a disk, or an address such as s3://bucket/x.
        size: edge of the evaluation view, pixels. None: what the model was made for.
        fp16: store half precision, and compute in it on a GPU.
        shard: images of a shard, rounded up to whole batches. A crash loses one shard at most. None: 4096, fewer of
            patches, more of millions of images.
        part: "i/n": only the i-th of n shares of the shards. Shares are written by commands that know nothing of each other.

    Returns:
        What is written; its `missing` names the shards that are not, of other parts.

    Raises:
        ValueError: `out` holds another embedding or something else, or no image can be read.
    """
    import_parquet()
    model = os.fspath(model) if isinstance(model, os.PathLike) else model
    data = os.fspath(data) if isinstance(data, os.PathLike) else data
    pool = errors.look_up("pooling", pooling, POOLINGS)
    network = weights.take(model, device)
    source, size = open_images(data) if isinstance(data, str) else data, size or network.view_size
    blank = torch.zeros(1, 1, size, size, 3, dtype=torch.uint8, device=next(network.parameters()).device)
    with torch.no_grad():
        shape = pool(network, normalize(blank, network.preprocessing)).shape[1:]  # [d] or [p, d]
    shard = choose_shard(shard, len(source), shape.numel(), size)
    name = runs.make_absolute(model) if isinstance(model, str) else ""
    place = make_absolute(data) if isinstance(data, str) else ""
    folder = os.fspath(out).rstrip("/") if is_remote(out) else os.path.expanduser(out)
    about = {"model": name, "model_sha256": fingerprint(network), "data": place, "data_sha256": source.fingerprint}
    about |= {"stamp": source.stamp(), "images": len(source), "pooling": pooling, "size": size, "fp16": fp16}
    shards = -(-len(source) // shard)
    about |= {"shard": shard, "shards": shards, "version": __version__}
    share = choose_share(shards, part or "1/1")
    missing = [number for number in distributed.from_main(lambda: _list_missing(folder, about)) if number in share]
    mine = missing[distributed.rank() :: distributed.world_size()]
    _write_shards(mine, folder, network, source, shape, about)
    distributed.barrier()
    if not share:
        return Folder(folder, [], about, 0, shape[-1], [], missing=range(shards))
    written = Folder.open(folder, whole=False)
    if not written.rows and not written.missing:
        raise ValueError(
            f"none of the {len(source)} images can be read, first {': '.join(written.bad[0])}; give others."
        )
    return written


def choose_shard(given: int | None, images: int, numbers: int, size: int) -> int:
    """Images of a shard, whole batches: `given`, or such that neither shards nor images in one are too many.

    Args:
        numbers: in a feature.
        size: of an image, pixels.
    """
    shard = given or max(1, min(max(SHARD, images // SHARD), MOST_VALUES // numbers))
    batch = min(choose_batch_size(size), shard)
    return -(-shard // batch) * batch


def choose_share(shards: int, part: str) -> range:
    """The numbers of the shards of part "i/n": neighbors, since their images may lie in one file."""
    i, n = required(parse_part(part))
    return range(shards * (i - 1) // n, shards * i // n)


def _list_missing(folder: str, about: dict[str, Any]) -> list[int]:
    """Numbers of the shards that are not written. Makes the folder and removes what killed processes left unfinished."""
    if is_remote(folder):
        require_writable(folder)
    else:
        try:
            os.makedirs(folder, exist_ok=True)
            files.sweep(Path(folder), ABANDONED)
        except OSError as error:
            raise errors.unwritable(Path(folder), error) from error
    missing = set(range(about["shards"]))
    shards, others = list_shards(folder)
    if alien := [name for name in others if not files.is_temporary(name) and not is_probe(name)]:
        raise ValueError(f"--out {folder} holds {alien[0]}, which is no part of an embedding; choose another --out.")
    for number, held in zip(shards, read_all([*shards.values()]), strict=True):
        if isinstance(held, Damaged):
            continue  # it is written again
        for key in IDENTITY:
            if held.get(key) != about[key]:
                raise ValueError(
                    f"--out {folder} holds another embedding, whose {key} is {str(held.get(key))[:12]} and not "
                    f"{str(about[key])[:12]}; choose another --out, or delete it."
                )
        missing.discard(number)
    return sorted(missing)


def _write_shards(
    numbers: Sequence[int], folder: str, network: Backbone, source: Source, shape: Sequence[int], about: dict[str, Any]
) -> None:
    """Compute the features of the shards of these numbers, and write each as soon as it is whole."""
    shard, size, pooling = about["shard"], about["size"], about["pooling"]
    batch = min(choose_batch_size(size), shard)
    ranges = [np.arange(number * shard, min((number + 1) * shard, len(source))) for number in numbers]
    positions = np.concatenate([np.zeros(0, np.int64), *ranges])
    batches = extract_batches(network, source, size, positions, batch, None, "embed", pooling, fp16=about["fp16"])
    for number in numbers:
        # Only the last shard has fewer batches, and it is the last of `numbers`.
        _write([*islice(batches, shard // batch)], f"{folder}/part-{number:06d}.parquet", source, shape, about)


def _write(found: list[Features], path: str, source: Source, shape: Sequence[int], about: dict[str, Any]) -> None:
    """Write the features that were found as a shard."""
    values, positions, bad = Features.concatenate(found, *shape)
    each = shape[0] if len(shape) == 2 else 1  # rows of an image
    names = [os.fsencode(source.name(i)).decode("utf-8", "replace") for i in positions.tolist()]
    columns = {"path": np.repeat(np.array(names, object), each), "index": np.repeat(positions, each)}
    if len(shape) == 2:
        columns["patch"] = np.tile(np.arange(each, dtype=np.int32), len(positions))
    flat = values.numpy().astype(np.float16 if about["fp16"] else np.float32).reshape(-1)
    write_shard(path, columns, flat.reshape(-1, shape[-1]), about | {"bad": bad})
