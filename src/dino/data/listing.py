"""The names of image files: of a folder searched at any depth, or of a list file. A run records them for its resume.

What is left out is counted and said in one line.

The names of a million files are kept in two arrays rather than a million strings, so that forked workers share them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import mmap
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from posixpath import normpath

import numpy as np

from dino import files
from dino.data.decode import AVIF_SUFFIXES, HEIF_SUFFIXES, IMAGE_SUFFIXES
from dino.data.labels import read_lines, read_table, suggest_path
from dino.data.storage import is_remote, list_files, list_folder
from dino.terminal import say

_VERSION = 1  # of the record's format
_SUFFIXES = tuple(suffix.encode() for suffix in sorted(IMAGE_SUFFIXES))
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_RAW_SUFFIXES = frozenset([".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw"])
# How to use pictures of kinds that are left out.
_ADVICE = {
    HEIF_SUFFIXES: "HEIC is read after: pip install 'dino-vision[heif]'",
    AVIF_SUFFIXES: "AVIF is read after: pip install -U pillow",
    _RAW_SUFFIXES: "export camera raw as JPEG",
}
# Of file managers, network drives and archives: thumbnails, deleted files, and the like. Left out without a word.
_JUNK = (
    *(b"thumbs.db", b"desktop.ini", b"@eadir", b"@recycle", b"@recently-snapshot", b"#recycle", b"#snapshot"),
    *(b"$recycle.bin", b"system volume information", b"lost+found", b"__macosx"),
)
_CHECKED = 10_000  # files of a list that are looked for


class Names:
    """Many file names as one bytes object and int64 offsets. Each name ends with NUL, which no file name contains."""

    def __init__(self, names: Iterable[str | bytes]):
        self.blob: bytes | mmap.mmap = b"".join(os.fsencode(name) + b"\0" for name in names)
        ends = np.flatnonzero(np.frombuffer(self.blob, np.uint8) == 0)
        self._starts = np.concatenate([np.zeros(1, np.int64), ends + 1])

    @classmethod
    def mapped(cls, blob: mmap.mmap, starts: np.ndarray) -> Names:
        """Names of a file that is mapped into memory, each of which begins at one of the `starts`, int64 [n + 1]."""
        names = cls(())
        names.blob, names._starts = blob, starts
        return names

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        index %= len(self)
        return os.fsdecode(self.blob[self._starts[index] : self._starts[index + 1] - 1])

    def split(self, start: int = 0, end: int | None = None) -> list[str]:
        """The names from `start` to before `end`."""
        first, last = self._starts[start], self._starts[len(self) if end is None else end]
        return os.fsdecode(self.blob[first:last]).split("\0")[:-1]


def locate(spec: str | os.PathLike[str]) -> str:
    """Absolute path of the folder or list file, or the address of the folder, that `spec` names."""
    spec = os.fspath(spec)
    if is_remote(spec):
        return spec.rstrip("/")
    if not spec or "\0" in spec:
        raise ValueError(f"The data path is {spec!r}, which is no path; give a folder of images or a list file.")
    path = os.path.abspath(os.path.expanduser(spec))
    if not os.path.exists(path):
        raise ValueError(f"The data path '{spec}' does not exist; {suggest_path(path)}")
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
    folders, links, direct = [b""], [], None
    while folders or links:
        if not folders:  # links last: a folder that is also below the root itself keeps its real name
            links.sort(reverse=True)
            folders.append(links.pop())
            direct = len(names) if direct is None else direct
        folder = folders.pop()
        where, prefix = os.path.join(os.fsencode(root), folder), folder and folder + b"/"
        try:
            if (identity := _identity(where)) in seen:  # seen before: links can form circles
                continue
            seen.add(identity)
            with os.scandir(where) as entries:
                for entry in entries:
                    name, lower = prefix + entry.name, entry.name.lower()
                    if is_junk(lower):
                        continue
                    linked = entry.is_symlink()  # only links need another look at the disk
                    if os.path.isdir(entry.path) if linked else entry.is_dir():
                        if linked and _leads_astray(entry.path, root):
                            others["links to the system or to a folder above"] += 1
                        else:
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
    said = []
    if others:
        said.append(f"{others.total():,} other files left out ({_count_kinds(others)})")
    if direct is not None and len(names) > direct:
        said.append(f"images in linked folders: {len(names) - direct:,}, first {os.fsdecode(min(names[direct:]))}")
    if closed:
        said.append(f"folders that may not be read: {len(closed)}, first {closed[0]}")
    _say_once(root, *said)
    return sorted(names)


def _scan_remote(folder: str) -> list[str]:
    """As `_scan`, of a folder at an address."""
    names = [name for name in list_files(folder) if not any(map(is_junk, os.fsencode(name).split(b"/")))]
    images = [name for name in names if os.fsencode(name).lower().endswith(_SUFFIXES)]
    others = Counter(os.path.splitext(name)[1].lower() or "without a suffix" for name in {*names} - {*images})
    if not images:
        raise ValueError(_no_images(folder, others, []))
    if others:
        _say_once(folder, f"{others.total():,} other files left out ({_count_kinds(others)})")
    return images


def look_into(path: str) -> dict[str, bool]:
    """The names of what lies right in a folder, and whether each is a folder; none where there is no such folder.

    Without hidden files and a system's own. A folder that cannot be read is refused where its images are looked for.
    """
    if not (is_remote(path) or os.path.isdir(path)):
        return {}
    try:
        return {name: kind for name, kind in list_folder(path).items() if not is_junk(os.fsencode(name))}
    except OSError:
        return {}


def is_junk(name: bytes) -> bool:
    """Whether a file or folder of this name is hidden, or a system's own."""
    return name.startswith(b".") or name.lower() in _JUNK


@functools.cache
def _say_once(path: str, *said: str) -> None:
    """Say what is remarkable about the data, once in a process: several parts of a command may open the same."""
    if said:
        say(f"{path}: {'; '.join(said)}.")


def _count_kinds(others: Counter[str]) -> str:
    """The counts, pictures first, and advice about them."""
    advice = [text for suffixes, text in _ADVICE.items() if suffixes & others.keys()]
    pictures = frozenset().union(*_ADVICE)
    kinds = sorted(others, key=lambda kind: (kind not in pictures, -others[kind], kind))
    counts = [f"{others[kind]:,} {kind}" for kind in kinds[:5]] + ["..."] * (len(kinds) > 5)
    return "; ".join([", ".join(counts), *advice])


def _leads_astray(link: bytes, root: str) -> bool:
    """Whether a link leads to a folder above `root`, which holds all else, or to the state of the system."""
    target, inside = (os.path.join(os.path.realpath(path), "") for path in (os.fsdecode(link), root))
    return (inside != target and inside.startswith(target)) or target.startswith(("/proc/", "/sys/"))


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
    return f"The folder '{root}' holds no images ({kinds}), only {_count_kinds(others)}; give a folder of images."


def _read_list(path: str) -> list[str]:
    names = [name for name, _ in read_table(path)] if path.lower().endswith(".csv") else read_lines(path)
    if not names:
        raise ValueError(f"The list '{path}' names no image; write one path per line.")
    folder, unique = os.path.dirname(path), {}
    if (remote := sum(map(is_remote, names))) == len(names):
        return [*dict.fromkeys(names)]
    if remote:
        raise ValueError(
            f"The list '{path}' names images on this disk and elsewhere; write two lists, and --data twice."
        )
    for name in names:
        unique.setdefault(normpath(os.path.join(folder, name)), name.removeprefix("./"))
    checked = list(unique)[:: -(-len(unique) // _CHECKED)]
    missing = [unique[file] for file in checked if not os.path.exists(file)]
    if len(missing) == len(checked):
        raise ValueError(
            f"None of the {len(checked)} images of the list '{path}' that were looked for exists, e.g. '{missing[0]}'; "
            f"write absolute paths or paths relative to '{folder}'."
        )
    said = []
    if repeated := len(names) - len(unique):
        said.append(f"repeated entries left out: {repeated:,}")
    if missing:
        said.append(f"missing images: {len(missing):,} of {len(checked):,} looked for, first {missing[0]}")
    _say_once(path, *said)
    return list(unique.values())


def list_names(path: str, record: Path | None, trust: bool) -> Names:
    """Names of the images at `path`; with `trust`, those that the file `record` holds.

    Raises:
        ValueError: the recorded images lay elsewhere and are not at `path`.
    """
    recorded = _load(record) if trust and record is not None else None
    if recorded is None:
        if is_remote(path):
            return Names(_scan_remote(path))
        return Names(_scan(path, record and record.parent) if os.path.isdir(path) else _read_list(path))
    root, names = recorded
    if is_remote(path):
        return names
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
    files.write(record, f"{json.dumps(header)}\n{json.dumps(names.split())}\n")


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
