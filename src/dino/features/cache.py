"""Features kept on disk, and used again as long as neither the model nor the images have changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dino import distributed, files
from dino.data.evaluation_views import Resize
from dino.data.sources import Source
from dino.features.extract import Features, Pooling, extract
from dino.models import Backbone
from dino.options import required

_in_use = ContextVar("cache in use", default=True)


def folder() -> Path:
    return files.cache_folder() / "features"


@contextlib.contextmanager
def bypass_cache() -> Iterator[None]:
    """Neither read nor write features within it."""
    token = _in_use.set(False)
    try:
        yield
    finally:
        _in_use.reset(token)


def load_or_extract(
    model: Backbone,
    model_hash: str,
    source: Source,
    size: int,
    device: torch.device,
    pooling: Pooling = "cls",
    progress: str | None = None,
    resize: Resize = "center",
) -> Features:
    """`extract` over all ranks, from the cache where it holds just these; every rank gets all of them.

    Args:
        model_hash: digest of the model's weights.
        pooling, resize: see `extract`.
    """
    if not _in_use.get():
        return extract(model, source, size, device, pooling=pooling, shared=True, progress=progress, resize=resize)
    key = [model_hash, source.fingerprint, source.stamp(), str(size), resize, pooling, str(len(source))]
    path = folder() / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.safetensors"
    found = _load(path) if distributed.is_main() else None
    if distributed.from_main(lambda: found is not None):
        return required(found or _load(path))
    result = extract(model, source, size, device, pooling=pooling, shared=True, progress=progress, resize=resize)
    if distributed.is_main():
        _save(path, result)
    distributed.barrier()
    return result


def _load(path: Path) -> Features | None:
    try:
        with safe_open(path, "pt") as file:
            bad = [(str(name), str(reason)) for name, reason in json.loads(file.metadata()["bad"])]
            return Features(file.get_tensor("values"), file.get_tensor("indices").numpy(), bad)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _save(path: Path, found: Features) -> None:
    """All or nothing; a cache that cannot be written is no reason to fail."""
    with contextlib.suppress(OSError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"values": found.values, "indices": torch.from_numpy(np.ascontiguousarray(found.indices))}
        with files.replacing(path) as temporary:
            save_file(tensors, temporary, {"bad": json.dumps(found.bad)})
