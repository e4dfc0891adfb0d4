"""Checkpoints that survive a kill at any moment and a full disk.

A checkpoint is written under a temporary name, flushed to the disk and renamed. Then the file `latest`, which holds its
name, is replaced in the same way, and then old checkpoints are deleted. Files are read with ``weights_only=True``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import lock_descriptor

from dino import errors, files

LOCK = ".lock"


class CheckpointError(Exception):
    """A checkpoint could not be written or read; the message says which one is still good."""


class Checkpoints:
    """The checkpoints of a run, in one folder.

    Args:
        keep: the number of newest checkpoints that are not deleted.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, keep

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        pointer = self.folder / "latest"
        if not pointer.is_file():
            return None
        path = self.folder / pointer.read_text().strip()
        return path if path.is_file() else None

    def complete(self) -> list[Path]:
        """All complete checkpoints, the oldest first."""
        return sorted(self.folder.glob("step-*.pt"))

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write `state` as the checkpoint of `step`.

        Raises:
            CheckpointError: the disk is full or not writable; earlier checkpoints stay as they are.
        """
        path = self.folder / f"step-{step:08d}.pt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with files.replacing(path, flush=True) as temporary, open(temporary, "wb") as file:
                torch.save(state, file)  # a path would stay open after a failure and keep its space
            with files.replacing(self.folder / "latest", flush=True) as temporary:
                temporary.write_text(path.name)
        except (OSError, RuntimeError) as error:  # PyTorch reports a failed write as a RuntimeError
            good = self.latest()
            kept = f"the previous checkpoint {good} is still good" if good else "there is no earlier checkpoint"
            raise CheckpointError(f"the checkpoint of step {step} could not be written ({error}); {kept}.") from error
        for old in self.complete()[: -self.keep]:
            old.unlink()
        return path

    def load(self) -> dict[str, Any] | None:
        """The newest checkpoint's state on the CPU, or None when there is none.

        Raises:
            CheckpointError: the file is damaged.
        """
        for leftover in self.folder.glob("*.tmp"):  # of a writer that was killed
            leftover.unlink()
        path = self.latest()
        return None if path is None else read_checkpoint(path)


_held: set[int] = set()  # descriptors of the locks of this process


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Make `folder` if it is missing, and lock it against other processes while the block runs.

    The operating system releases the lock when the process ends, even by SIGKILL. Forked processes, such as data workers,
    do not inherit it: a worker that outlives its parent does not keep the folder locked.

    Raises:
        ValueError: another process is writing there, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise errors.unwritable(folder, error) from error
    _held.add(descriptor)
    try:
        with contextlib.suppress(OSError):  # a network file system without locks
            if not lock_descriptor(descriptor, blocking=False):
                raise ValueError(
                    f"another process is writing to {folder}; wait for it, stop it, or choose another --out."
                )
        yield
    finally:
        if descriptor in _held:  # not in a forked child, where it is closed already
            _held.remove(descriptor)
            os.close(descriptor)


def _drop_inherited() -> None:
    """Close the locks' descriptors in a forked child; an flock lasts until every process has closed its copy."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_drop_inherited)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint file. Only tensors and plain values are read, so that no code in the file can run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} is not a readable checkpoint: {errors.first_line(error)}.") from error
