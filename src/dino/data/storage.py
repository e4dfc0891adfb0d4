"""Files on a disk, or at an address such as s3://bucket/1.tar: through fsspec, with retries.

Credentials and endpoints are found where each library looks for them (AWS_PROFILE, AWS_ENDPOINT_URL, ...).
"""

from __future__ import annotations

import contextlib
import glob
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from dino import errors, files

TRIES = 8
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds; each wait is twice the one before
_PROBE = ".dino-probe-"
_BLOCK = 2**23  # bytes read ahead where a file is read to its end
_VERSION = ("size", "ETag", "etag", "LastModified", "updated", "mtime")  # what file systems tell of a file, if they do
_FINAL = (FileNotFoundError, PermissionError, ImportError, NotImplementedError)  # they do not go away by waiting

_OPENED: dict[int, Any] = {}  # file systems; a fork that let go of those that it inherits would try to close them

T = TypeVar("T")


class Place(NamedTuple):
    """Bytes of a file; `length` None: all of it. `version`: another one after it has changed, where that is known."""

    path: str
    offset: int = 0
    length: int | None = None
    version: str = ""


def is_remote(path: str | os.PathLike[str]) -> bool:
    return "://" in os.fspath(path)


def join(folder: str, name: str) -> str:
    """The file that a list in `folder` names."""
    return name if is_remote(name) else os.path.normpath(os.path.join(folder, os.path.expanduser(name)))


def open_filesystem(path: str, **options: Any) -> tuple[Any, str]:
    """fsspec's file system for an address, and the path in it. To be called anew in each process, which it is made for.

    Raises:
        ValueError: no library for such addresses is installed.
    """
    fsspec = errors.import_optional("fsspec", f"{path} needs fsspec", "data")
    try:
        system, inside = fsspec.core.url_to_fs(path, **options)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be opened: {errors.first_line(error)} (pip install 'dino-vision[data]')."
        ) from error
    _OPENED[id(system)] = system
    return system, inside


def ask(path: str, question: Callable[[Any, str], T]) -> T:
    """What a file system says of an address.

    Raises:
        ValueError: it is not there, may not be read, or cannot be reached.
    """
    system, inside = open_filesystem(path)
    try:
        return try_often(lambda: question(system, inside), tries=3)
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


def list_names(folder: str) -> list[str]:
    """The names of what lies right in a folder now, whoever wrote it; none where there is no such folder.

    Raises:
        ValueError: it cannot be read.
    """
    if not is_remote(folder):
        return os.listdir(folder) if os.path.isdir(folder) else []

    def look(system: Any, inside: str) -> list[str]:
        system.invalidate_cache()  # of listings, which others have made longer
        try:
            return system.ls(inside, detail=False)
        except FileNotFoundError:
            return []

    return [path.rstrip("/").rpartition("/")[2] for path in ask(folder, look)]


def list_files(folder: str, again: bool = False) -> dict[str, str]:
    """The files in and below a folder elsewhere: the name of each relative to it, and a text that changes with the file.

    Args:
        again: ask anew, since files may have come since this process asked last.
    """

    def look(system: Any, inside: str) -> tuple[dict[str, Any], str]:
        if again:
            system.invalidate_cache()
        return system.find(inside, detail=True), inside.rstrip("/")

    found, root = ask(folder, look)
    return {path[len(root) :].lstrip("/"): _get_version(found[path]) for path in sorted(found)}


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
    return ask(path, lambda system, inside: _get_version(system.info(inside)) if system.exists(inside) else None)


def _get_version(info: Mapping[str, Any]) -> str:
    return " ".join(str(info[key]) for key in _VERSION if info.get(key))


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


def ask_of_file(path: str, question: Callable[[Any], T]) -> T:
    """What is found in a file elsewhere, read here and there; `question` takes the open file.

    Raises:
        ValueError: it is not there, or cannot be read.
    """

    def read(system: Any, inside: str) -> T:
        with system.open(inside, "rb", cache_type="none") as stream:
            return question(stream)

    return ask(path, read)


def write_file(path: str, content: bytes) -> None:
    """Write a file that is whole or absent, also after a crash: by another name on a disk, by one put elsewhere.

    Raises:
        WriteError: it cannot be written.
    """
    if not is_remote(path):
        files.write(Path(path), content, flush=True)
        return
    _change(path, lambda system, inside: system.pipe_file(inside, content))


def upload(path: Path, address: str) -> None:
    """Copy a file to an address, where it is whole or absent.

    Raises:
        WriteError: it cannot be written.
    """
    _change(address, lambda system, inside: system.put_file(str(path), inside))


def download(address: str, path: Path) -> None:
    """Copy the file at an address to this disk, where it is whole or absent, and make its folder.

    Raises:
        ValueError: it is not there, or cannot be read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as temporary:
        ask(address, lambda system, inside: system.get_file(inside, str(temporary)))


def delete(address: str) -> None:
    """Delete a file elsewhere.

    Raises:
        WriteError: it cannot be deleted.
    """
    _change(address, lambda system, inside: system.rm_file(inside))


def _change(address: str, work: Callable[[Any, str], None]) -> None:
    system, inside = open_filesystem(address)
    try:
        try_often(lambda: work(system, inside), TRIES)
    except Exception as error:
        raise files.WriteError(
            f"{address} cannot be written ({errors.first_line(error)}); check the address, the network and your credentials."
        ) from error


def require_writable(folder: str) -> None:
    """Write an empty file into a folder elsewhere, and delete it.

    Raises:
        WriteError: it cannot be written.
    """
    write_file(probe := f"{folder}/{_PROBE}{os.getpid()}", b"")
    with contextlib.suppress(Exception):  # who may write need not be allowed to delete
        ask(probe, lambda system, inside: system.rm_file(inside))


def is_probe(name: str) -> bool:
    """Whether `require_writable` wrote this file."""
    return name.startswith(_PROBE)


def try_often(work: Callable[[], T], tries: int) -> T:
    """The result of `work`, which is tried again after a wait when it fails."""
    for attempt in range(tries - 1):
        try:
            return work()
        except _FINAL:
            raise
        except Exception:
            longest = min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt)
            time.sleep(longest * random.uniform(0.5, 1))
    return work()
