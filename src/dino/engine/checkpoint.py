"""Checkpoints that survive a kill at any moment and a full disk.

A checkpoint is written under a temporary name, flushed to the disk and renamed; only then does `latest` (a file that
holds its name) move, and only then are old ones deleted. Files are read with ``weights_only=True``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


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

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write `state` as the checkpoint of `step`.

        Raises:
            CheckpointError: the disk is full or not writable; nothing that was there before is touched.
        """
        path = self.folder / f"step-{step:08d}.pt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(path, lambda file: torch.save(state, file))
            _write(self.folder / "latest", lambda file: file.write(path.name.encode()))
        except (OSError, RuntimeError) as error:  # PyTorch reports a failed write as a RuntimeError
            good = self.latest()
            kept = f"the previous checkpoint {good} is still good" if good else "there is no earlier checkpoint"
            raise CheckpointError(f"the checkpoint of step {step} could not be written ({error}); {kept}.") from error
        complete = sorted(self.folder.glob("step-*.pt"))
        for old in complete[: -self.keep]:
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
        return None if path is None else read(path)


def read(path: Path) -> dict[str, Any]:
    """A checkpoint file's state; tensors and plain values only, so that reading runs no code of the file's."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} is not a readable checkpoint: {str(error).splitlines()[0]}") from error


def _write(path: Path, write: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
