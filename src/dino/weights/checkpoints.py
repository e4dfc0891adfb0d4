"""Reading the checkpoints of a training: the newest one that is whole, whatever happened to the others.

A checkpoint is a zip file, in which PyTorch records a checksum of every tensor when it writes it. All are compared when it
is read. Only tensors and plain values are read, so that no code in a file can run.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dino import distributed, errors
from dino.weights import pickles

WHOLE = ".metadata"  # the file of a sharded checkpoint that is written last


class CheckpointError(Exception):
    """A checkpoint could not be written or read; the message says which one is still good."""


class Checkpoint(NamedTuple):
    path: Path
    state: dict[str, Any]  # on the CPU
    refused: list[str]  # why newer ones were not taken, a sentence each


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the oldest first."""
    return sorted(path for path in folder.glob("step-*.pt") if path.stem.removeprefix("step-").isdigit())


def list_sharded(folder: Path, whole: bool = True) -> list[Path]:
    """The checkpoints of a sharded run in `folder`, the oldest first: folders, of which those are whole that say so."""
    found = sorted(path for path in folder.glob("step-*.shards") if path.stem.removeprefix("step-").isdigit())
    return [path for path in found if not whole or (path / WHOLE).is_file()]


def get_step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def read_newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in `folder` that is whole; None when there is none at all.

    Raises:
        CheckpointError: there are some, but none is whole.
    """
    return take_newest(list_checkpoints(folder), read_checkpoint)


def take_newest(paths: Sequence[Path], read: Callable[[Path], dict[str, Any]]) -> Checkpoint | None:
    """The newest of `paths`, the oldest first, that `read` can read; the errors as of `read_newest`."""
    refused: list[str] = []
    for path in reversed(paths):
        try:
            return Checkpoint(path, read(path), refused)
        except CheckpointError as error:
            refused.append(str(error))
    if refused:
        raise CheckpointError(
            f"none of the {len(refused)} checkpoints in {paths[0].parent} can be used: {refused[0]} Copy one from a backup, "
            "or start again in another folder."
        )
    return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint file.

    Raises:
        CheckpointError: it is damaged, or holds numbers that are not finite.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        state = pickles.load_pickle(path) if damaged is None else None
    except Exception as error:  # a damaged archive raises errors of many kinds
        raise CheckpointError(f"{path} is not a readable checkpoint ({errors.find_reason(error)}).") from error
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise CheckpointError(f"{path} is not a readable checkpoint (its content is not what was written).")
    if not are_finite(find_tensors(state)):
        raise CheckpointError(f"{path} holds numbers that are not finite.")
    return state


def find_tensors(nested: Any) -> Iterator[Tensor]:
    """All tensors in nested dictionaries, lists and tuples."""
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, dict | list | tuple):
        for value in nested.values() if isinstance(nested, dict) else nested:
            yield from find_tensors(value)


def are_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether all numbers (this rank's, of sharded ones) are finite, as one bool on their device, without waiting for it."""
    own = map(distributed.get_local, tensors)
    floats = [tensor for tensor in own if tensor.is_floating_point() and tensor.numel()]
    if not floats:
        return torch.tensor(True)
    largest = torch._foreach_norm(floats, ord=float("inf"))  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack([value.float() for value in largest]).isfinite().all()
