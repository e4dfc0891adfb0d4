"""Places on the disk: files that are replaced as a whole, folders for output and caches, absolute paths."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from dino import errors


@contextlib.contextmanager
def replacing(path: Path, flush: bool = False) -> Iterator[Path]:
    """A temporary name to write to. It replaces `path` at the end; after an error it is deleted and `path` is untouched.

    Args:
        flush: write it to the disk first, so that a loss of power does not harm it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if flush:
            _flush(temporary)
        os.replace(temporary, path)
        if flush and os.name != "nt":  # Windows opens no folder
            _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(out: Path, leave: bool = False) -> Iterator[None]:
    """Delete `out`, the file or folder that --out names, when an error ends the block.

    Args:
        leave: do not delete it.

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
    """`name` as an absolute path if such a file exists, so that it holds in another working directory; else unchanged."""
    path = os.path.expanduser(name)
    return os.path.abspath(path) if name and os.path.exists(path) else name


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(out: str, kinds: str, inputs: Iterable[str] = ()) -> Path:
    """Refuse an `out` that cannot be written, before any work is spent; make its folder and return it as a path.

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


def sweep(folder: Path) -> None:
    """Delete what `replacing` left in `folder` when its process was killed. Nobody else may be writing there."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            path.unlink(missing_ok=True)
