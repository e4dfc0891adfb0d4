"""Which files there are: a folder searched at any depth or a list file, scanned once and remembered.

The listing of a million files is kept in two arrays rather than a million strings, so that forked workers share it,
and on disk (`cache`), so that it is not scanned again: adding, removing or renaming a file changes the modification
time of its directory, hence checking the directories alone shows whether a recorded listing still holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
import uuid
from collections import Counter
from pathlib import Path

import numpy as np

from dino.data.decode import IMAGE_SUFFIXES
from dino.data.labels import nearest, read_table, text

_VERSION = 1  # of the cache; raise it when the file format, the suffixes or the rules for hidden files change
_SETTLED_NS = 2_000_000_000  # a directory changed this recently may change again within one tick of its clock
_SUFFIXES = tuple(suffix.encode() for suffix in sorted(IMAGE_SUFFIXES))
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_JUNK = (b"thumbs.db", b"desktop.ini")  # left behind by file managers; not worth mentioning in a message


class Names:
    """Many file names in one bytes object (each ends with NUL, which no file name holds) and int64 start offsets."""

    def __init__(self, blob: bytes):
        self.blob = blob
        ends = np.flatnonzero(np.frombuffer(blob, np.uint8) == 0)
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
        raise ValueError(f"The data path '{spec}' does not exist; {nearest(path)}.")
    suffix = os.path.splitext(path)[1].lower()
    if os.path.isdir(path) or (os.path.isfile(path) and suffix in (".txt", ".csv")):
        return path
    if suffix in IMAGE_SUFFIXES:
        raise ValueError(f"The data path '{spec}' is one image; give the folder that holds it.")
    if suffix in _ARCHIVES:
        raise ValueError(f"The data path '{spec}' is an archive; unpack it and give the folder.")
    raise ValueError(f"The data path '{spec}' is neither a folder nor a list; give a folder or a .txt or .csv file.")


def _scan(root: str, skip: Path | None) -> tuple[list[bytes], dict[str, int]]:
    """Sorted names of the image files under `root`, and the stamp of every folder visited ("" is the root)."""
    names: list[bytes] = []
    stamps: dict[str, int] = {}
    others: Counter[str] = Counter()
    seen = {_identity(skip)} - {_identity(root), None}
    folders, links = [b""], []
    while folders or links:
        if not folders:  # real folders first: a linked folder keeps its real name if it has one under the root
            links.sort(reverse=True)
            folders.append(links.pop())
        folder = folders.pop()
        where = os.path.join(os.fsencode(root), folder)
        if (identity := _identity(where)) in seen:  # reached before: links may lead in circles
            continue
        if identity:
            seen.add(identity)
        stamps[os.fsdecode(folder)] = stamp = _stamp(where)  # before reading: what is added meanwhile shows next time
        if stamp < 0:
            continue
        try:
            with os.scandir(where) as entries:
                for entry in entries:
                    _sort_in(entry, folder and folder + b"/", names, folders, links, others)
        except OSError:  # it vanished or broke while being read
            stamps[os.fsdecode(folder)] = -1
    if not names:
        raise ValueError(_no_images(root, others, stamps))
    names.sort()
    return names, stamps


def _sort_in(
    entry: os.DirEntry[bytes],
    prefix: bytes,
    names: list[bytes],
    folders: list[bytes],
    links: list[bytes],
    others: Counter[str],
) -> None:
    """Add what one directory entry is to the list it belongs to. Only a link costs a look at the disk."""
    lower = entry.name.lower()
    if lower.startswith(b".") or lower in _JUNK:
        return
    linked = entry.is_symlink()
    if os.path.isdir(entry.path) if linked else entry.is_dir():
        (links if linked else folders).append(prefix + entry.name)
    elif not lower.endswith(_SUFFIXES):
        others[os.fsdecode(os.path.splitext(lower)[1]) or "without a suffix"] += 1
    elif os.path.isfile(entry.path) if linked else entry.is_file():
        names.append(prefix + entry.name)
    else:
        others["broken links or special files"] += 1


def _no_images(root: str, others: Counter[str], stamps: dict[str, int]) -> str:
    kinds = ", ".join(sorted(IMAGE_SUFFIXES))
    if closed := [folder or "." for folder, stamp in stamps.items() if stamp < 0]:
        return f"No image was found in '{root}', where '{closed[0]}' may not be read; change its permissions."
    if not others:
        return f"The folder '{root}' holds no files; give a folder of images ({kinds})."
    found = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
    return f"The folder '{root}' holds no images ({kinds}), only {found}; give a folder of images."


def _identity(path: str | bytes | Path | None) -> tuple[int, int] | None:
    """What stays the same however a folder is reached; None if there is no such folder."""
    try:
        status = os.stat(path or "")
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _stamp(path: str | bytes) -> int:
    """Modification time in ns, or -1 for what is missing or closed to us, so that gaining access is a change too."""
    try:
        status = os.stat(path)
    except OSError:
        return -1
    need = os.R_OK | os.X_OK if stat.S_ISDIR(status.st_mode) else os.R_OK
    return status.st_mtime_ns if os.access(path, need) else -1


def _read_list(path: str) -> tuple[list[bytes], dict[str, int]]:
    stamp = _stamp(path)
    if path.lower().endswith(".csv"):
        names = [name for name, _ in read_table(path)]
    else:
        lines = (line.strip() for line in text(path).split("\n"))
        names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise ValueError(f"The list '{path}' names no image; write one path per line.")
    folder = os.path.dirname(path)
    if not any(os.path.exists(os.path.join(folder, name)) for name in names[:100]):
        raise ValueError(
            f"None of the first {min(100, len(names))} images of the list '{path}' exists, e.g. '{names[0]}'; "
            f"write absolute paths or paths relative to '{folder}'."
        )
    return [os.fsencode(name.removeprefix("./")) for name in names], {"": stamp}


def recorded(path: str, cache: Path | None, trust: bool) -> tuple[Names, str]:
    """Names of the images at `path`, from `cache` where that still holds, and how they were come by."""
    old = None if cache is None else _load(cache, path)
    if old is not None:
        names, stamps, scanned_ns = old
        same = all(_stamp(os.path.join(path, key) if key else path) == stamp for key, stamp in stamps.items())
        if same and (trust or max(stamps.values()) < scanned_ns - _SETTLED_NS):
            return names, "cached"
        if trust:
            return names, "cached (changed since)"
    now = time.time_ns()
    found, stamps = _scan(path, cache and cache.parent) if os.path.isdir(path) else _read_list(path)
    names = Names(b"".join(name + b"\0" for name in found))
    if cache is not None:
        _save(cache, path, names, stamps, now)
    closed = sum(stamp < 0 for stamp in stamps.values())
    note = f", {closed} folders could not be read" if closed else ""
    if old is None or old[0].blob == names.blob:
        return names, "scanned" + note
    before, after = Counter(old[0].split()), Counter(names.split())
    return names, f"changed (+{(after - before).total()} -{(before - after).total()})" + note


def _save(cache: Path, path: str, names: Names, stamps: dict[str, int], scanned_ns: int) -> None:
    """Write a line with what the listing depends on and a line with the names, both JSON; all or nothing."""
    header = {"version": _VERSION, "root": path, "number": len(names), "scanned_ns": scanned_ns}
    header |= {"sha256": hashlib.sha256(names.blob).hexdigest(), "stamps": stamps}
    cache.parent.mkdir(parents=True, exist_ok=True)
    temporary = cache.with_name(f"{cache.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(f"{json.dumps(header)}\n{json.dumps(names.split())}\n", encoding="ascii")
        os.replace(temporary, cache)
    finally:
        temporary.unlink(missing_ok=True)


def _load(cache: Path, path: str) -> tuple[Names, dict[str, int], int] | None:
    """Names, stamps and time of scan that `cache` records for `path`; None if it is missing, damaged or another's."""
    try:
        first, _, second = cache.read_bytes().partition(b"\n")
        header = json.loads(first)
        if header["version"] != _VERSION or header["root"] != path:
            return None
        names = Names(os.fsencode("\0".join(json.loads(second)) + "\0"))
        if (header["number"], header["sha256"]) != (len(names), hashlib.sha256(names.blob).hexdigest()):
            return None
        stamps = {str(key): int(stamp) for key, stamp in header["stamps"].items()}
        return (names, stamps, int(header["scanned_ns"])) if stamps else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
