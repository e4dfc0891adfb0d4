"""The names of image files: of a folder searched at any depth, or of a list file. A run records them for its resume.

The names of a million files are kept in two arrays rather than a million strings, so that forked workers share them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dino import files
from dino.data.decode import IMAGE_SUFFIXES
from dino.data.labels import read_table, read_text, suggest_path

_VERSION = 1  # of the record's format
_SUFFIXES = tuple(suffix.encode() for suffix in sorted(IMAGE_SUFFIXES))
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_JUNK = (b"thumbs.db", b"desktop.ini")  # of file managers; left out of messages


class Names:
    """Many file names as one bytes object and int64 offsets. Each name ends with NUL, which no file name contains."""

    def __init__(self, names: Iterable[str | bytes]):
        self.blob = b"".join(os.fsencode(name) + b"\0" for name in names)
        ends = np.flatnonzero(np.frombuffer(self.blob, np.uint8) == 0)
        self._starts = np.concatenate([np.zeros(1, np.int64), ends + 1])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        index %= len(self)
        return os.fsdecode(self.blob[self._starts[index] : self._starts[index + 1] - 1])

    def split(self) -> list[str]:
        return os.fsdecode(self.blob).split("\0")[:-1]


def locate(spec: str) -> str:
    """Absolute path of the folder or list file that `spec` names."""
    if not spec or "\0" in spec:
        raise ValueError(f"The data path is {spec!r}, which is no path; give a folder of images or a list file.")
    path = os.path.abspath(os.path.expanduser(spec))
    if not os.path.exists(path):
        raise ValueError(f"The data path '{spec}' does not exist; {suggest_path(path)}.")
    suffix = os.path.splitext(path)[1].lower()
    if os.path.isdir(path) or (os.path.isfile(path) and suffix in (".txt", ".csv")):
        return path
    if suffix in IMAGE_SUFFIXES:
        raise ValueError(f"The data path '{spec}' is one image; give the folder that holds it.")
    if suffix in _ARCHIVES:
        raise ValueError(f"The data path '{spec}' is an archive; unpack it and give the folder.")
    raise ValueError(f"The data path '{spec}' is neither a folder nor a list; give a folder or a .txt or .csv file.")


def _scan(root: str, skip: Path | None) -> list[bytes]:
    """Sorted names of the image files under `root`, without those in the folder `skip`."""
    names: list[bytes] = []
    closed: list[str] = []
    others: Counter[str] = Counter()
    seen = set() if skip is None or not skip.exists() or skip.samefile(root) else {_identity(skip)}
    folders, links = [b""], []
    while folders or links:
        if not folders:  # links last: a folder that is also below the root itself keeps its real name
            links.sort(reverse=True)
            folders.append(links.pop())
        folder = folders.pop()
        where, prefix = os.path.join(os.fsencode(root), folder), folder and folder + b"/"
        try:
            if (identity := _identity(where)) in seen:  # seen before: links can form circles
                continue
            seen.add(identity)
            with os.scandir(where) as entries:
                for entry in entries:
                    name, lower = prefix + entry.name, entry.name.lower()
                    if lower.startswith(b".") or lower in _JUNK:
                        continue
                    linked = entry.is_symlink()  # only links need another look at the disk
                    if os.path.isdir(entry.path) if linked else entry.is_dir():
                        (links if linked else folders).append(name)
                    elif not lower.endswith(_SUFFIXES):
                        others[os.fsdecode(os.path.splitext(lower)[1]) or "without a suffix"] += 1
                    elif os.path.isfile(entry.path) if linked else entry.is_file():
                        names.append(name)
                    else:
                        others["broken links or special files"] += 1
        except OSError:  # no permission, or it vanished
            closed.append(os.fsdecode(folder) or ".")
    if not names:
        raise ValueError(_no_images(root, others, closed))
    return sorted(names)


def _identity(path: bytes | Path) -> tuple[int, int]:
    """The same for a folder whatever path leads to it."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _no_images(root: str, others: Counter[str], closed: list[str]) -> str:
    kinds = ", ".join(sorted(IMAGE_SUFFIXES))
    if closed:
        return f"No image was found in '{root}', where '{closed[0]}' may not be read; change its permissions."
    if not others:
        return f"The folder '{root}' holds no files; give a folder of images ({kinds})."
    found = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
    return f"The folder '{root}' holds no images ({kinds}), only {found}; give a folder of images."


def _read_list(path: str) -> list[str]:
    if path.lower().endswith(".csv"):
        names = [name for name, _ in read_table(path)]
    else:
        lines = (line.strip() for line in read_text(path).split("\n"))
        names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise ValueError(f"The list '{path}' names no image; write one path per line.")
    folder = os.path.dirname(path)
    if not any(os.path.exists(os.path.join(folder, name)) for name in names[:100]):
        raise ValueError(
            f"None of the first {min(100, len(names))} images of the list '{path}' exists, e.g. '{names[0]}'; "
            f"write absolute paths or paths relative to '{folder}'."
        )
    return [name.removeprefix("./") for name in names]


def list_names(path: str, record: Path | None, trust: bool) -> Names:
    """Names of the images at `path`; with `trust`, those that the file `record` holds.

    Raises:
        ValueError: the recorded images lay elsewhere and are not at `path`.
    """
    recorded = _load(record) if trust and record is not None else None
    if recorded is None:
        return Names(_scan(path, record and record.parent) if os.path.isdir(path) else _read_list(path))
    root, names = recorded
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    some = {names[round(i)] for i in np.linspace(0, len(names) - 1, 1000)} if root != path else ()
    if missing := [name for name in some if not os.path.exists(os.path.join(folder, name))]:
        raise ValueError(
            f"--resume continues a run with the images it was started with, those of {root}, but {missing[0]} is not in "
            f"{folder}; give the place where they are now, or start a new run with another --out."
        )
    return names


def save_names(record: Path, path: str, names: Names) -> None:
    """Write a line about the listing of `path` and a line with its names, both JSON; all or nothing."""
    digest = hashlib.sha256(names.blob).hexdigest()
    header = {"version": _VERSION, "root": path, "number": len(names), "sha256": digest}
    with files.replacing(record) as temporary:
        temporary.write_text(f"{json.dumps(header)}\n{json.dumps(names.split())}\n", encoding="ascii")


def _load(record: Path) -> tuple[str, Names] | None:
    """The path and the names that `record` holds; None if it is missing or damaged."""
    try:
        first, _, second = record.read_bytes().partition(b"\n")
        header = json.loads(first)
        names = Names(json.loads(second))
        said = [header[key] for key in ("version", "sha256")]
        return (header["root"], names) if said == [_VERSION, hashlib.sha256(names.blob).hexdigest()] else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
