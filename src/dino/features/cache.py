"""Features kept on disk, and used again until the model or the images change."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dino import distributed, files
from dino.data.evaluation_views import Resize
from dino.data.sources import Source
from dino.features.extract import Features, Pooling, extract, select_labels
from dino.models import Backbone
from dino.options import required
from dino.weights import fingerprint

_in_use = ContextVar("cache in use", default=True)


@contextlib.contextmanager
def bypass_cache() -> Iterator[None]:
    """Neither read nor write the cache inside this context."""
    token = _in_use.set(False)
    try:
        yield
    finally:
        _in_use.reset(token)


def load_or_extract(
    model: Backbone, source: Source, size: int, pooling: Pooling, progress: str, resize: Resize = "as trained"
) -> Features:
    """`extract` over all ranks, or its result from the cache. Every rank gets the features of all images."""

    def compute() -> Features:
        return extract(model, source, size, pooling=pooling, shared=True, progress=progress, resize=resize)

    if not _in_use.get():
        return compute()
    key = [fingerprint(model), str(model.preprocessing), source.fingerprint, source.stamp(), str(size), resize, pooling]
    key.append(str(len(source)))
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    path = files.cache_folder() / "features" / f"{name}.safetensors"
    found = _load(path) if distributed.is_main() else None
    if distributed.from_main(lambda: found is not None):
        return required(found or _load(path))
    result = compute()
    if distributed.is_main():
        _save(path, result)
    distributed.barrier()
    return result


class LabeledFeatures(NamedTuple):
    """Features and labels of the readable images of a source."""

    values: Tensor  # [m, d] float32, on the CPU
    labels: Tensor  # [m] int64
    indices: np.ndarray  # [m] positions in the source


def load_labeled(model: Backbone, source: Source, size: int, what: str, pooling: Pooling = "cls") -> LabeledFeatures:
    """`load_or_extract` of labeled images. `what` they are ("training") is for the progress bar and for errors.

    Raises:
        ValueError: no image can be read.
    """
    found = load_or_extract(model, source, size, pooling, f"{what} images")
    return LabeledFeatures(found.values, select_labels(source, found, what), found.indices)


def _load(path: Path) -> Features | None:
    """None if there is no such file, or it is damaged or of a broken model."""
    try:
        with safe_open(path, "pt") as file:
            bad = [(str(name), str(reason)) for name, reason in json.loads(file.metadata()["bad"])]
            values = file.get_tensor("values")
            return Features(values, file.get_tensor("indices").numpy(), bad) if values.isfinite().all() else None
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _save(path: Path, found: Features) -> None:
    """Write the whole file, or none. A cache that cannot be written is no error."""
    with contextlib.suppress(OSError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"values": found.values, "indices": torch.from_numpy(np.ascontiguousarray(found.indices))}
        with files.replacing(path) as temporary:
            save_file(tensors, temporary, {"bad": json.dumps(found.bad)})
