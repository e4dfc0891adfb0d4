"""Reads places of files: ahead where it is told what comes next, and with a bounded cache of those that lie elsewhere."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dino import errors, files
from dino.data.ranges import fetch
from dino.data.storage import Place, is_remote
from dino.terminal import say

_SWEEP = 2**26  # bytes written to the cache by a process between two looks at the size of all


class Reader:
    """Reads places, ahead where it is told what comes next, and keeps what it has read on the disk.

    Args:
        most: bytes to keep there, about; 0: nothing is kept.
    """

    def __init__(self, most: int = 0):
        self.most, self.written = most, 0
        self.announced: Sequence[Place] = ()
        self._begin()

    def _begin(self) -> None:
        self.process, self.pool = os.getpid(), ThreadPoolExecutor(2)
        self.coming: dict[Place, tuple[Future[list[bytes]], int]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Reader, (self.most,)

    def read_ahead(self, places: Sequence[Place]) -> None:
        """Begin to read what `read` will be asked for. The same places again, as a batch that was the next one, are known."""
        if places == self.announced:
            return
        self.announced = places
        if not is_remote(places[0].path):
            _tell_disk(places)
            return
        if self.process != os.getpid():  # a fork has no threads
            self._begin()
        if new := [place for place in dict.fromkeys(places) if place not in self.coming]:
            reading = self.pool.submit(self._read, new)
            self.coming |= {place: (reading, number) for number, place in enumerate(new)}

    def read(self, place: Place) -> bytes:
        """The bytes there, fewer where a file on a disk has become shorter.

        Raises:
            Unreachable: a file elsewhere cannot be read.
            OSError: one on a disk cannot be read, or is nowhere.
        """
        if not is_remote(place.path):
            return _read_from_disk(place)
        if self.process != os.getpid() or place not in self.coming:
            return self._read([place])[0]
        reading, number = self.coming.pop(place)
        try:
            return reading.result()[number]
        except FileNotFoundError:  # of another place perhaps
            return self._read([place])[0]

    def _read(self, places: Sequence[Place]) -> list[bytes]:
        kept = [self._load(place) for place in places] if self.most else [None] * len(places)
        missing = [place for place, content in zip(places, kept, strict=True) if content is None]
        fetched = iter(fetch(missing) if missing else ())
        found = [next(fetched) if content is None else content for content in kept]
        for place, before, content in zip(places, kept, found, strict=True):
            if self.most and before is None:
                self._keep(place, content)
        return found

    # --- what is kept on the disk

    @staticmethod
    def _name(place: Place) -> Path:
        name = hashlib.sha256(repr(tuple(place)).encode(errors="surrogateescape")).hexdigest()
        return files.cache_folder() / "images" / name[:2] / name

    def _load(self, place: Place) -> bytes | None:
        try:
            content = (path := self._name(place)).read_bytes()
            os.utime(path)  # it was used
        except OSError:
            return None
        return content

    def _keep(self, place: Place, content: bytes) -> None:
        path = self._name(place)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write(path, content)
            self.written += len(content)
            if self.written > min(_SWEEP, self.most // 8):
                self.written = 0
                sweep(path.parent.parent, self.most)
        except OSError as error:
            self.most = 0
            say(
                f"Warning: images are no longer kept in {path.parent.parent} ({errors.find_reason(error)}); the run goes on."
            )


class _Opened:
    """A file's descriptor, closed when nobody needs it any more."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it could not be opened
            os.close(self.descriptor)


@functools.lru_cache(maxsize=128)
def _open_shard(path: str, version: str) -> _Opened:
    """Shards stay open, since many places lie in each."""
    return _Opened(path)


def _tell_disk(places: Sequence[Place]) -> None:
    """Let the system read from its disks what will be wanted, many places at a time, where it can."""
    for place in places if hasattr(os, "posix_fadvise") else ():
        with contextlib.suppress(OSError):
            file = _Opened(place.path) if place.length is None else _open_shard(place.path, place.version)
            os.posix_fadvise(file.descriptor, place.offset, place.length or 0, os.POSIX_FADV_WILLNEED)


def _read_from_disk(place: Place) -> bytes:
    if place.length is not None and hasattr(os, "pread"):  # which leaves alone the position that forked workers share
        return os.pread(_open_shard(place.path, place.version).descriptor, place.length, place.offset)
    with open(place.path, "rb", buffering=0) as file:
        file.seek(place.offset)
        return file.read(-1 if place.length is None else place.length)


def sweep(folder: Path, most: int) -> None:
    """Delete what was used longest ago from a cache of more than `most` bytes, down to nine tenths of it."""
    found = []
    for path in folder.glob("*/*"):
        with contextlib.suppress(OSError):  # another process may have deleted it
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size, path))
    size = sum(entry[1] for entry in found)
    for _, length, path in sorted(found) if size > most else ():
        if size <= 0.9 * most:
            break
        path.unlink(missing_ok=True)
        size -= length
