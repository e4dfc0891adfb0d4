"""Checkpoints of sharded runs, by torch.distributed.checkpoint: each rank writes its part, while training goes on.

A checkpoint is a folder. `state.pt` has what is small, other files have the tensors. `.metadata` says where their parts lie,
and is written last. A folder without it was left by a writer that was killed, and counts for nothing.
Nothing is renamed, so that this also holds on network disks. Any number of ranks reads what any other has written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from dino import distributed, errors, files
from dino.engine.checkpoint import Checkpoints, write_state
from dino.engine.step import TrainingStep
from dino.weights import pickles
from dino.weights.checkpoints import WHOLE, Checkpoint, CheckpointError, are_finite, get_step, list_sharded

STATE = "state.pt"


class ShardedCheckpoints(Checkpoints):
    """The checkpoints of a run whose networks may be spread over ranks. All ranks call all methods."""

    def __init__(self, folder: Path, keep: int, step: TrainingStep):
        super().__init__(folder, keep)
        self.step = step
        # Their own group, because they are exchanged from a thread beside the training.
        self.group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.writing: tuple[Path, Future[Any]] | None = None

    def find_all(self) -> list[Path]:
        return list_sharded(self.folder)

    def load(self) -> Checkpoint | None:
        """The newest whole checkpoint; its tensors are spread as those of the step are, or whole on a single rank."""
        distributed.from_main(self._sweep)
        return self._load(distributed.from_main(self.find_all), self._read)

    def _sweep(self) -> None:
        for path in set(list_sharded(self.folder, whole=False)) - set(self.find_all()):
            shutil.rmtree(path)

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            state, reader = distributed.from_main(lambda: read_small(path)), FileSystemReader(path)
            moments = self._make_moments(reader)
            tensors = self.step.method.state_dict() | moments
            with quiet():
                load(tensors, storage_reader=reader, process_group=self.group)
        except (Exception, CheckpointException) as error:  # which is no Exception, and is raised on all ranks
            raise CheckpointError(f"{path} is not a readable checkpoint ({find_reason(error)}).") from error
        if not all(distributed.gather(bool(are_finite(tensors.values())))):
            raise CheckpointError(f"{path} holds numbers that are not finite.")
        optimizer: dict[int, dict[str, Tensor]] = {}
        for key in moments:
            _, number, name = key.split("/")
            optimizer.setdefault(int(number), {})[name] = tensors.pop(key)
        state["optimizer"]["state"] = optimizer
        return state | {"method": tensors}

    def _make_moments(self, reader: FileSystemReader) -> dict[str, Tensor]:
        """Empty tensors like those of the optimizer that lie there, by their names in the checkpoint."""
        parameters = [p for group in self.step.optimizer.param_groups for p in group["params"]]
        found: dict[str, Tensor] = {}
        for key, kept in reader.read_metadata().state_dict_metadata.items():
            if key.startswith("optimizer/"):
                like = parameters[int(key.split("/")[1])]
                assert isinstance(kept, TensorStorageMetadata)
                is_alike, dtype = like.shape == kept.size, kept.properties.dtype
                found[key] = torch.empty_like(like) if is_alike else torch.empty(kept.size, dtype=dtype)
        return found

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Begin to write `state` as the checkpoint of `step`, after the one before has been written."""
        self.finish()
        path = self.folder / f"step-{step:08d}.shards"
        if path in self.good:
            return path
        moments = state["optimizer"]["state"]
        tensors = state["method"] | {
            f"optimizer/{number}/{name}": value for number, of_one in moments.items() for name, value in of_one.items()
        }
        small = state | {"method": {}, "optimizer": state["optimizer"] | {"state": {}}}
        writer = FileSystemWriter(path)
        with self._naming(step), quiet():
            distributed.from_main(lambda: write_state(path / STATE, small))
            if self.group is None:
                future: Future[Any] = Future()
                future.set_result(save(tensors, storage_writer=writer))
            else:
                future = cast("Future[Any]", async_save(tensors, storage_writer=writer, process_group=self.group))
        self.writing = path, future
        return path

    def finish(self) -> None:
        """Wait until the checkpoint that was begun has been written, and delete old ones.

        Raises:
            CheckpointError: it could not be written; earlier ones stay as they are.
        """
        if self.writing is None:
            return
        (path, future), self.writing = self.writing, None
        with self._naming(get_step(path)):
            future.result()
        self.good = [*self.good, path]
        if distributed.is_main():
            self.point()
            for old in self.good[: -self.keep]:
                (old / WHOLE).unlink(missing_ok=True)  # first, so that what is left by a kill counts for nothing
                shutil.rmtree(old, ignore_errors=True)
        self.good = self.good[-self.keep :]

    @contextlib.contextmanager
    def _naming(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, CheckpointException) as error:
            raise self.explain(step, find_reason(error)) from error


def find_reason(error: BaseException) -> str:
    """As `errors.find_reason`; of an error of several ranks, of the first of them."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return os.strerror(errno.ENOSPC) if files.is_failed_write(error) else errors.find_reason(error)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without PyTorch's warnings about single processes, and about its own older names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_small(path: Path) -> dict[str, Any]:
    """All but the tensors of the networks and the optimizer. Raises errors of many kinds."""
    pickles.check_metadata(path / WHOLE)
    return pickles.load_pickle(path / STATE)
