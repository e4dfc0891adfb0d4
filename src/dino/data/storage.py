"""Files on a disk, or at an address such as s3://bucket/1.tar: through fsspec, many ranges at once, with retries and a cache.

Credentials and endpoints are found where each library looks for them (AWS_PROFILE, AWS_ENDPOINT_URL, ...).
"""

from __future__ import annotations

import contextlib
import glob
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple, TypeVar

from dino import errors

TRIES = 8
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds; each wait is twice the one before
_BLOCK = 2**23  # bytes read ahead where a file is read to its end
_VERSION = ("size", "ETag", "etag", "LastModified", "updated", "mtime")  # what file systems tell of a file, if they do
# They do not go away by waiting.
_FINAL = (FileNotFoundError, PermissionError, ImportError, NotImplementedError)

_OPENED: dict[int, Any] = {}  # file systems; a fork that let go of those that it inherits would try to close them

T = TypeVar("T")


class Unreachable(OSError):
    """A file elsewhere could not be read, although it was tried for minutes."""


class Place(NamedTuple):
    """Bytes of a file; `length` None: all of it. `version`: another one after it has changed, where that is known."""

    path: str
    offset: int = 0
    length: int | None = None
    version: str = ""

    @property
    def end(self) -> int | None:
        return None if self.length is None else self.offset + self.length


def is_remote(path: str | os.PathLike[str]) -> bool:
    return "://" in os.fspath(path)


def join(folder: str, name: str) -> str:
    """The file that a list in `folder` names."""
    return name if is_remote(name) else os.path.normpath(os.path.join(folder, os.path.expanduser(name)))


def open_filesystem(path: str) -> tuple[Any, str]:
    """fsspec's file system for an address, and the path in it. To be called anew in each process, which it is made for.

    Raises:
        ValueError: no library for such addresses is installed.
    """
    fsspec = errors.import_optional("fsspec", f"{path} needs fsspec", "data")
    try:
        system, inside = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{path} cannot be opened: {errors.first_line(error)} (pip install 'dino[data]').") from error
    _OPENED[id(system)] = system
    return system, inside


def ask(path: str, question: Callable[[Any, str], T]) -> T:
    """What a file system says of an address.

    Raises:
        ValueError: it is not there, may not be read, or cannot be reached.
    """
    system, inside = open_filesystem(path)
    with _in_a_sentence(path):
        return _try_often(lambda: question(system, inside), tries=3)


@contextlib.contextmanager
def _in_a_sentence(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"there is no {path}; check the address.") from error
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read ({errors.first_line(error)}); check the address, the network and your credentials."
        ) from error


def list_folder(folder: str) -> dict[str, bool]:
    """The names of what lies right in a folder, and whether each is a folder.

    Raises:
        OSError: a folder on a disk cannot be read.
        ValueError: one elsewhere cannot be read.
    """
    if not is_remote(folder):
        with os.scandir(folder) as entries:
            return {entry.name: entry.is_dir() for entry in entries}
    found = ask(folder, lambda system, inside: system.ls(inside, detail=True))
    return {info["name"].rstrip("/").rpartition("/")[2]: info["type"] == "directory" for info in found}


def list_files(folder: str) -> dict[str, str]:
    """The files in and below a folder elsewhere: the name of each relative to it, and a text that changes with the file."""
    found, root = ask(folder, lambda system, inside: (system.find(inside, detail=True), inside.rstrip("/")))
    versions = {path: [str(info.get(key)) for key in _VERSION if info.get(key)] for path, info in found.items()}
    return {path[len(root) :].lstrip("/"): " ".join(versions[path]) for path in sorted(found)}


def find_matching(pattern: str) -> list[str]:
    """The files whose paths match * and ?, sorted."""
    if not is_remote(pattern):
        return sorted(glob.glob(pattern))
    found = ask(pattern, lambda system, inside: [system.unstrip_protocol(path) for path in system.glob(inside)])
    return sorted(found)


def describe(path: str) -> str | None:
    """A text that is another one after the file has changed; None: there is no such file.

    Raises:
        ValueError: it cannot be reached.
    """
    if not is_remote(path):
        status = os.stat(path) if os.path.isfile(path) else None
        return status and f"{status.st_size} {status.st_mtime_ns}"
    system, inside = open_filesystem(path)
    with _in_a_sentence(path):
        info = _try_often(lambda: system.info(inside) if system.exists(inside) else None, tries=3)
    return info and " ".join(str(info[key]) for key in _VERSION if info.get(key))


def describe_all(paths: Sequence[str]) -> list[str | None]:
    """`describe`, of many at once."""
    with ThreadPoolExecutor(32) as pool:
        return [*pool.map(describe, paths)]


@contextlib.contextmanager
def read_through(path: str) -> Iterator[BinaryIO]:
    """The file, to be read from its beginning to its end."""
    if not is_remote(path):
        with open(path, "rb") as stream:
            yield stream
        return
    system, inside = open_filesystem(path)
    with system.open(inside, "rb", block_size=_BLOCK, cache_type="readahead") as stream:
        yield stream


def _try_often(work: Callable[[], T], tries: int = TRIES) -> T:
    """The result of `work`, which is tried again after a wait when it fails."""
    for attempt in range(tries - 1):
        try:
            return work()
        except _FINAL:
            raise
        except Exception:
            _wait(attempt)
    return work()


def _wait(attempt: int) -> None:
    time.sleep(min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1))


def fetch(places: Sequence[Place]) -> list[bytes]:
    """The bytes at each of the places, of one file system, all asked for at once. What fails is asked for again.

    Raises:
        FileNotFoundError: a file is not there.
        Unreachable: one could not be read.
    """
    system = open_filesystem(places[0].path)[0]
    found: dict[int, bytes] = {}
    for attempt in range(TRIES):
        missing = [i for i in range(len(places)) if i not in found]
        wanted = [places[i] for i in missing]
        paths, starts, ends = zip(
            *((system._strip_protocol(p.path), p.offset or None, p.end) for p in wanted), strict=True
        )
        failed: Exception | None = None
        for i, place, content in zip(missing, wanted, system.cat_ranges([*paths], starts, ends), strict=True):
            if isinstance(content, FileNotFoundError):
                raise content
            if isinstance(content, Exception):
                failed = content
            elif place.length is not None and len(content) != place.length:
                failed = OSError(f"{len(content)} of {place.length} bytes of {place.path} came")
            else:
                found[i] = content
        if failed is None:
            return [found[i] for i in range(len(places))]
        if isinstance(failed, _FINAL) or attempt == TRIES - 1:
            raise Unreachable(f"{places[missing[0]].path} cannot be read: {errors.first_line(failed)}") from failed
        _wait(attempt)
    raise AssertionError
