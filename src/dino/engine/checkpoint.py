"""Checkpoints that survive a kill at any moment and a full disk.

A checkpoint is written under a temporary name, flushed to the disk and renamed; only then does `latest` (a file that
holds its name) move, and only then are old ones deleted. Files are read with ``weights_only=True``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dino import errors, files

LOCK = ".lock"


class CheckpointError(Exception):
    """A checkpoint could not be written or read; the message says which one is still good."""


class Checkpoints:
    """The folder `checkpoints/` of a run."""

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
        """All that are kept, the oldest first."""
        return sorted(self.folder.glob("step-*.pt"))

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write `state` as the checkpoint of `step`.

        Raises:
            CheckpointError: the disk is full or not writable; nothing that was there before is touched.
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
        for leftover in self.folder.glob("*.tmp"):  # of a killed writer
            leftover.unlink()
        path = self.latest()
        return None if path is None else read_checkpoint(path)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold `folder` (made if need be) against other processes.

    The lock is the process's own and ends with it, however it ends; data workers that outlive it hold nothing.

    Raises:
        ValueError: another process is writing there, or nobody can.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_WRONLY | os.O_CREAT)
    except OSError as error:
        raise errors.unwritable(folder, error) from error
    with open(descriptor, "wb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(
                f"another process is writing to {folder}; wait for it, stop it, or choose another --out."
            ) from error
        except OSError:
            pass  # a network file system without locks
        yield


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint file's state; tensors and plain values only, so that reading runs no code of the file's."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} is not a readable checkpoint: {errors.first_line(error)}.") from error
