"""Weights at an address such as s3://bucket/runs/a, in the cache on this disk."""

from __future__ import annotations

import hashlib
import posixpath

from dino import files
from dino.data import storage
from dino.weights.runs import BEST, CONFIG, WEIGHTS

_OF_RUNS = (CONFIG, "config.toml", BEST, WEIGHTS)


def bring(name: str) -> str:
    """The path of the weights that lie at the address `name`, copied here unless they are; any other name as it is.

    Of a run its checkpoints are left there.

    Raises:
        ValueError: nothing is there, or it cannot be read.
    """
    if not storage.is_remote(name):
        return name
    address, last = name.removesuffix(":last").rstrip("/"), ":last" * name.endswith(":last")
    base = posixpath.basename(address)
    if posixpath.splitext(base)[1] in (".safetensors", ".pth", ".pt"):
        versions = {base: storage.describe(address) or ""}
        address = posixpath.dirname(address)
    else:
        found = storage.list_files(address, again=True)
        versions = {file: found[file] for file in _OF_RUNS if file in found}
        if WEIGHTS not in versions:
            raise ValueError(
                f"there is no {WEIGHTS} at {address}; give the --out address of a run that has saved once."
            )
    digest = hashlib.sha256(repr((address, versions)).encode()).hexdigest()[:16]
    folder = files.cache_folder() / "weights" / f"{base}-{digest}"
    for file in versions:
        if not (folder / file).is_file():
            storage.download(f"{address}/{file}", folder / file)
    return str(folder / base if base in versions else folder) + last
