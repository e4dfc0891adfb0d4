"""Run directories at an address such as s3://bucket/runs/a: a folder on this disk, and a copy of it there after every save.

An object store has no locks and renames nothing, but what is put there is whole or absent. So a checkpoint of one file is
whole. Of a sharded one `.metadata` is put last, without which it counts for nothing. `checkpoints/latest` follows both.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from dino import files
from dino.data import storage
from dino.engine.folder import list_written
from dino.options import replace
from dino.options.train import TrainOptions
from dino.weights.checkpoints import WHOLE, list_sharded

STEP = re.compile(r"checkpoints/step-(\d{8})\.")
LAST = {WHOLE: 1, "latest": 2, "config.toml": 3}  # names of files that are copied after all others, in this order


class Mirror:
    """The folder of a run on this disk, and its copy at an address.

    Raises:
        ValueError: the copy cannot be read or written; what is on this disk stays.
    """

    def __init__(self, address: str):
        self.address = address.rstrip("/")
        name = f"{self.address.rpartition('/')[2]}-{hashlib.sha256(self.address.encode()).hexdigest()[:8]}"
        self.folder = files.cache_folder() / "runs" / name
        self.copied: dict[str, tuple[int, int]] = {}  # sizes and times of files when they were copied

    def list_copied(self) -> list[str]:
        """The names of the files at the address."""
        return [*storage.list_files(self.address, again=True)]

    def fetch(self) -> None:
        """Bring what is at the address here, unless what is here is as new: another machine may have gone on."""
        here, there = self._list_here(), self.list_copied()
        if "config.toml" not in there or ("config.toml" in here and find_step(here) >= find_step(there)):
            return
        for name in sort_for_copying(there):
            storage.download(f"{self.address}/{name}", path := self.folder / name)
            self.copied[name] = stamp(path)

    def push(self) -> None:
        """Copy what has changed here since the last time, and delete checkpoints there that are no longer here."""
        here = self._list_here()
        for name in sort_for_copying(here):
            if (now := stamp(self.folder / name)) != self.copied.get(name):
                storage.upload(self.folder / name, f"{self.address}/{name}")
                self.copied[name] = now
        for name in sort_for_copying(set(self.list_copied()) - {*here})[::-1]:
            if STEP.match(name):
                storage.delete(f"{self.address}/{name}")

    def _list_here(self) -> list[str]:
        whole = list_sharded(self.folder / "checkpoints")  # others are being written
        paths = [path for path in list_written(self.folder) if path.parent.suffix != ".shards" or path.parent in whole]
        return [path.relative_to(self.folder).as_posix() for path in paths]


def sort_for_copying(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (LAST.get(name.rpartition("/")[2], 0), name))


def find_step(names: Iterable[str]) -> int:
    """Of the newest checkpoint among them; -1: there is none."""
    return max((int(found[1]) for found in map(STEP.match, names) if found), default=-1)


def stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def open_mirror(options: TrainOptions) -> tuple[TrainOptions, Mirror | None]:
    """The options with a folder on this disk as `out`, and the mirror, if `out` is an address.

    Raises:
        ValueError: there is a run, and it is not to be resumed.
    """
    if options.out is None or not storage.is_remote(options.out):
        return options, None
    mirror = Mirror(options.out)
    if options.overwrite:
        raise ValueError(
            f"--overwrite deletes nothing at an address; delete {options.out} yourself, or choose another --out."
        )
    if options.resume is not None:
        mirror.fetch()
    elif "config.toml" in mirror.list_copied():
        raise ValueError(f"{options.out} holds a run; continue it with --resume auto, or choose another --out.")
    return replace(options, {"out": str(mirror.folder)}), mirror


def bring_run(name: str) -> Path:
    """The folder on this disk of the run `name`, a folder or an address.

    Raises:
        ValueError: there is no run at the address.
    """
    if not storage.is_remote(name):
        return Path(name).expanduser()
    mirror = Mirror(name)
    mirror.fetch()
    if not mirror.folder.exists():
        raise ValueError(f"{name} holds no run (no config.toml); give the --out address of a run.")
    return mirror.folder
