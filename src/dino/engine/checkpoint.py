"""Checkpoints that survive a kill at any moment and a full disk.

A checkpoint is written under a temporary name, flushed to the disk and renamed. Then the file `latest`, which tells people
its name, is replaced in the same way, and then old checkpoints are deleted. `dino.weights.checkpoints` reads them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import lock_descriptor

from dino import distributed, errors, files
from dino.weights.checkpoints import Checkpoint, CheckpointError, list_checkpoints, read_checkpoint, take_newest

LOCK = ".lock"


class Checkpoints:
    """The checkpoints of a run, in one folder.

    Args:
        keep: the number of checkpoints written last that are not deleted.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, keep
        self.good: list[Path] = []  # in the order in which they were written

    def load(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None when there is none. Files that a killed writer left are deleted.

        Raises:
            CheckpointError: there are checkpoints, but none is whole.
        """
        files.sweep(self.folder)
        return self._load(self.find_all(), read_checkpoint)

    def _load(self, paths: Sequence[Path], read: Callable[[Path], dict[str, Any]]) -> Checkpoint | None:
        found = take_newest(paths, read)
        if found is not None:
            self.good = [*paths[: paths.index(found.path) + 1]]
        return found

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write `state` as the checkpoint of `step`.

        Raises:
            CheckpointError: the disk is full or not writable; earlier checkpoints stay as they are.
        """
        path = self.folder / f"step-{step:08d}.pt"
        try:
            write_state(path, state)
            self.good = [*(old for old in self.good if old != path), path]
            self.point()
        except OSError as error:
            raise self.explain(step, errors.find_reason(error)) from error
        for old in self.good[: -self.keep]:
            old.unlink(missing_ok=True)
        self.good = self.good[-self.keep :]
        return path

    def explain(self, step: int, reason: str) -> CheckpointError:
        """What to say of a checkpoint that could not be written."""
        return CheckpointError(
            f"the checkpoint of step {step} could not be written ({reason}); {self.describe_good()}; "
            f"{errors.advise_space(reason)}repeat the command, or resume the run, to go on from there."
        )

    def finish(self) -> None:
        """Wait for what is still being written: nothing, where a file is written at once."""

    def point(self) -> None:
        """Name the last good checkpoint in the file `latest`."""
        files.write(self.folder / "latest", self.good[-1].name, flush=True)

    def find_all(self) -> list[Path]:
        """Those that there are, the oldest first."""
        return list_checkpoints(self.folder)

    def describe_good(self) -> str:
        """The checkpoint to go on from, as the end of a sentence."""
        good = self.good if distributed.is_main() else self.find_all()
        return f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a file, whole or not at all, and its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path, flush=True) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)  # a path would stay open after a failure and keep its space


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
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
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
