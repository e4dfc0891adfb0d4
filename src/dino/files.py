"""Places on the disk: files that are there whole or not at all, and names of places that last."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from dino import errors


@contextlib.contextmanager
def replacing(path: Path, flush: bool = False) -> Iterator[Path]:
    """A name to write to that takes the place of `path` when all went well, and is gone otherwise.

    Args:
        flush: to the disk, so that it survives a loss of power too.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if flush:
            _flush(temporary)
        os.replace(temporary, path)
        if flush:
            _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(out: Path, leave: bool = False) -> Iterator[None]:
    """What fails within leaves nothing at the place that --out names, unless told to `leave` it.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        yield
    except BaseException as error:
        if not leave:
            shutil.rmtree(out, ignore_errors=True) if out.is_dir() else out.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise errors.unwritable(out, error) from error
        raise


def cache_folder() -> Path:
    """Where downloads and features are kept: $DINO_CACHE, or ~/.cache/dino."""
    return Path(os.environ.get("DINO_CACHE") or "~/.cache/dino").expanduser()


def absolute_if_exists(name: str) -> str:
    """`name`, which means the same from another working directory if it is a path."""
    return os.path.abspath(name) if name and os.path.exists(name) else name


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(out: str, kinds: str, inputs: Iterable[str] = ()) -> Path:
    """`out` as a path that can be written, its folder made, before any work is spent.

    Raises:
        ValueError: it cannot be written, has none of the suffixes `kinds`, or is one of the `inputs`.
    """
    path = Path(out)
    if path.suffix.lower() not in kinds.split():
        raise ValueError(f"--out is {out}; choose a name that ends in {kinds.replace(' ', ' or ')}.")
    if any(path.exists() and os.path.exists(given) and path.samefile(given) for given in inputs):
        raise ValueError(f"--out {out} is the input itself; choose another --out.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written ({error.strerror or error}); choose another --out.") from error
    return path
