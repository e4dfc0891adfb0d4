"""Places on the disk: files that are replaced as a whole, folders for output and caches, absolute paths."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from dino import errors


class WriteError(OSError, ValueError):
    """A file could not be written. What was there before is unharmed; the message says where, why and what to do."""


# What PyTorch, FAISS and others say of a failed write in a RuntimeError; their other RuntimeErrors are not about files.
_FAILED_WRITE = re.compile(r"inline_container|PytorchStreamWriter|write error|os error|errno", re.IGNORECASE)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_failed_write(error: BaseException) -> bool:
    """Whether a library's RuntimeError says that it could not write: hardly for another reason than a full disk."""
    return isinstance(error, RuntimeError) and _FAILED_WRITE.search(str(error)) is not None


def require_folder(path: Path, flag: str) -> None:
    """Refuse a file, the value of `flag`, whose folder does not exist.

    Raises:
        ValueError: it does not.
    """
    if not (folder := path.absolute().parent).is_dir():
        raise ValueError(f"{flag} {path} cannot be written: there is no folder {folder}; make it first.")


@contextlib.contextmanager
def naming(what: object, remedy: str = "choose another place or name") -> Iterator[None]:
    """Around the writing of `what`, a path: whatever a library makes of a full disk becomes a `WriteError`."""
    try:
        yield
    except WriteError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not is_failed_write(error):
            raise
        # Of the others hardly anything else is known.
        code = error.errno if isinstance(error, OSError) else errno.ENOSPC
        reason, full = os.strerror(code) if code else errors.first_line(error), code in _FULL
        first = "free some space there, or " if full else ""
        raise WriteError(f"{what} cannot be written ({reason}); {first}{remedy}.") from error


@contextlib.contextmanager
def replacing(path: Path, flush: bool = False) -> Iterator[Path]:
    """A temporary name to write to. It replaces `path` at the end; after an error it is deleted and `path` is untouched.

    Args:
        flush: write it to the disk first, so that a loss of power does not harm it.

    Raises:
        WriteError: the disk is full, or the place cannot be written.
    """
    name = os.fsencode(path.name)[:200].decode(errors="ignore")  # a name may have 255 bytes
    # Not the process's number: another machine may have a process of that number.
    temporary = path.with_name(f".{name}.{secrets.randbits(62)}.tmp")
    with naming(path):
        try:
            temporary.touch()
            mode = temporary.stat().st_mode  # what the umask gives; some libraries write files for their owner alone
            yield temporary
            temporary.chmod(mode)
            if flush:
                _flush(temporary)
            os.replace(temporary, path)
            if flush and os.name != "nt":  # Windows opens no folder
                _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write(path: Path, content: str | bytes, flush: bool = False) -> None:
    """Write a whole file, or none; text as UTF-8."""
    with replacing(path, flush) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


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
            with contextlib.suppress(OSError):
                shutil.rmtree(out, ignore_errors=True) if out.is_dir() else out.unlink(missing_ok=True)
        # What cannot be read elsewhere, an input for example, is no fault of --out.
        place = Path(os.fsdecode(getattr(error, "filename", None) or out))
        if out not in (place, *place.parents) and place not in out.parents:
            raise
        with naming(f"--out {out}"):
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


def check_writable(out: str | os.PathLike[str], kinds: str, inputs: Iterable[str] = (), option: str = "--out") -> Path:
    """Refuse an `out` that cannot be written, before any work is spent; make its folder and return it as a path.

    Raises:
        ValueError: it cannot be written, has none of the suffixes `kinds`, or is one of the `inputs`.
    """
    path = Path(out).expanduser()
    if path.suffix.lower() not in kinds.split():
        raise ValueError(f"{option} is {out}; choose a name that ends in {kinds.replace(' ', ' or ')}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists() and any(os.path.exists(given) and path.samefile(given) for given in inputs):
            raise ValueError(f"{option} {out} is the input itself; choose another {option}.")
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{option} {out} cannot be written ({reason}); choose another {option}.") from error
    return path


def is_temporary(name: str) -> bool:
    """Whether `replacing` gave this name to a file that is not yet whole."""
    return re.fullmatch(r"\..+\.\d+\.tmp", name) is not None


def sweep(folder: Path, older: float = 0) -> None:
    """Delete what `replacing` left in `folder` when its process was killed.

    Args:
        older: seconds since it was last written. 0: whatever its age, where nobody else can be writing.
    """
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # another process was as quick
            if is_temporary(path.name) and (not older or path.stat().st_mtime < time.time() - older):
                path.unlink()
