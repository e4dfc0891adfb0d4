"""Which images there are: a folder searched at any depth or a list file, as a `Source` of images by position.

The listing of a million files is kept in two arrays rather than a million strings, so that forked workers share it,
and on disk (`cache`), so that it is not scanned again: adding, removing or renaming a file changes the modification
time of its directory, hence checking the directories alone shows whether a recorded listing still holds.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import os
import stat
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from posixpath import normpath
from typing import Protocol

import numpy as np

from dino.data.decode import IMAGE_SUFFIXES, decode

_VERSION = 1  # of the cache; raise it when the file format, the suffixes or the rules for hidden files change
_SETTLED_NS = 2_000_000_000  # a directory changed this recently may change again within one tick of its clock
_SUFFIXES = tuple(suffix.encode() for suffix in sorted(IMAGE_SUFFIXES))
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_JUNK = (b"thumbs.db", b"desktop.ini")  # left behind by file managers; not worth mentioning in a message
_PATH_COLUMNS, _LABEL_COLUMNS = ("path", "file", "filename", "image"), ("label", "class")


class Source(Protocol):
    """Images by position; the order is fixed, so a position means the same image in every process and run."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; () when unlabelled."""
        ...

    @property
    def labels(self) -> np.ndarray | None:
        """int64 [n], index into `classes`, -1 = unknown; None when unlabelled."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest of names and labels: which data this is."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What people see: the path relative to the folder."""
        ...

    def read(self, index: int) -> np.ndarray:
        """[h, w, 3] uint8 RGB; raises `dino.data.decode.BadImage`."""
        ...


class _Names:
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


class Files:
    """A `Source` of image files. `name(i)` is relative to `root` (or as written in the list file).

    `listing` says where the names come from: "scanned", "cached", "changed (+3 -1)" (scanned; differs from the
    cache by that many names) or "cached (changed since)" (`trust_cache`; the folder no longer looks as recorded).
    """

    def __init__(self, root: str, names: _Names, classes: tuple[str, ...], labels: np.ndarray | None, listing: str):
        self.root, self._names, self.classes, self.labels, self.listing = root, names, classes, labels, listing
        digest = hashlib.sha256(names.blob)
        if labels is not None:
            digest.update(json.dumps(classes).encode() + labels.astype("<i8").tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> np.ndarray:
        return decode(os.path.join(self.root, self._names[index]))


class Subset:
    """Some images of another source, in the order of `indices` [n]."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source, self.indices, self.classes = source, indices, source.classes
        self.labels = None if source.labels is None else source.labels[indices]
        chosen = indices.astype("<i8").tobytes()
        self.fingerprint = hashlib.sha256(source.fingerprint.encode() + chosen).hexdigest()

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def read(self, index: int) -> np.ndarray:
        return self.source.read(int(self.indices[index]))


def subset(source: Source, indices: Sequence[int] | np.ndarray) -> Source:
    """A view of `source` with the images at `indices` (each in [0, n)), keeping names, labels and classes."""
    chosen = np.asarray(indices, dtype=np.int64)
    assert chosen.ndim == 1
    assert not chosen.size or (chosen.min() >= 0 and chosen.max() < len(source))
    return Subset(source, chosen)


def split(source: Source, fraction: float, maximum: int, seed: int) -> tuple[Source, Source | None]:
    """Training images and min(maximum, round(fraction * n)) held-out ones, both in the order of `source`.

    At least one image stays for training. The second is None when nothing is held out. The choice depends on n and
    `seed` alone: it sorts raw Philox numbers, whose stream, unlike NumPy's `permutation`, never changes.
    """
    count = min(maximum, round(fraction * len(source)), len(source) - 1)
    if count <= 0:
        return source, None
    key = np.array([seed % 2**64, int.from_bytes(b"held-out")], np.uint64)  # no other use of the seed has this stream
    order = np.argsort(np.random.Philox(key=key).random_raw(len(source)), kind="stable")
    return subset(source, np.sort(order[count:])), subset(source, np.sort(order[:count]))


def open_source(spec: str, labels: str = "auto", cache: Path | None = None, trust_cache: bool = False) -> Files:
    """The images of a folder (searched at any depth, sorted by path) or of a list file (in the order of the list).

    A list is a .txt file (one path per line; '#' starts a comment line) or a .csv file (columns path and, if known,
    label); its paths are relative to it. Hidden files and folders are skipped, links to folders are followed once.

    labels: 'auto' (the list's labels; else the first folder level if it looks like classes), 'folders' (the first
    folder level), 'none', or a CSV file of path,label with paths relative to the images' folder or to the CSV.
    cache: a file that records the listing; used as long as no directory (or the list) has changed, else rewritten.
    The folder it lies in, a run's, is not searched: what a run draws is not data.
    trust_cache: use the recorded listing even if the folder has changed since, as a resumed run must.

    Raises ValueError, in one sentence, when the spec or the labels cannot be what was meant.
    """
    path = _locate(spec)
    root = path if os.path.isdir(path) else os.path.dirname(path)
    names, listing = _recorded(path, cache, trust_cache)
    classes, indices = _label(labels, names.split(), path, root)
    return Files(root, names, classes, indices, listing)


# ---- finding the images


def _locate(spec: str) -> str:
    """Absolute path of the folder or list file that `spec` names."""
    if not spec or "\0" in spec:
        raise ValueError(f"The data path is {spec!r}, which is no path; give a folder of images or a list file.")
    path = os.path.abspath(os.path.expanduser(spec))
    if not os.path.exists(path):
        raise ValueError(f"The data path '{spec}' does not exist; {_nearest(path)}.")
    suffix = os.path.splitext(path)[1].lower()
    if os.path.isdir(path) or (os.path.isfile(path) and suffix in (".txt", ".csv")):
        return path
    if suffix in IMAGE_SUFFIXES:
        raise ValueError(f"The data path '{spec}' is one image; give the folder that holds it.")
    if suffix in _ARCHIVES:
        raise ValueError(f"The data path '{spec}' is an archive; unpack it and give the folder.")
    raise ValueError(f"The data path '{spec}' is neither a folder nor a list; give a folder or a .txt or .csv file.")


def _nearest(path: str) -> str:
    """Advice about the missing `path`: an existing name like the first part of it that is wrong."""
    while not os.path.exists(parent := os.path.dirname(path)):
        path = parent
    try:
        siblings = os.listdir(parent)
    except OSError:
        siblings = []
    if close := difflib.get_close_matches(os.path.basename(path), siblings, n=1):
        return f"did you mean '{os.path.join(parent, close[0])}'"
    return f"check the spelling of what follows '{parent}', which does"


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
        names = [name for name, _ in _read_table(path)]
    else:
        lines = (line.strip() for line in _text(path).split("\n"))
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


# ---- remembering them


def _recorded(path: str, cache: Path | None, trust: bool) -> tuple[_Names, str]:
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
    names = _Names(b"".join(name + b"\0" for name in found))
    if cache is not None:
        _save(cache, path, names, stamps, now)
    closed = sum(stamp < 0 for stamp in stamps.values())
    note = f", {closed} folders could not be read" if closed else ""
    if old is None or old[0].blob == names.blob:
        return names, "scanned" + note
    before, after = Counter(old[0].split()), Counter(names.split())
    return names, f"changed (+{(after - before).total()} -{(before - after).total()})" + note


def _save(cache: Path, path: str, names: _Names, stamps: dict[str, int], scanned_ns: int) -> None:
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


def _load(cache: Path, path: str) -> tuple[_Names, dict[str, int], int] | None:
    """Names, stamps and time of scan that `cache` records for `path`; None if it is missing, damaged or another's."""
    try:
        first, _, second = cache.read_bytes().partition(b"\n")
        header = json.loads(first)
        if header["version"] != _VERSION or header["root"] != path:
            return None
        names = _Names(os.fsencode("\0".join(json.loads(second)) + "\0"))
        if (header["number"], header["sha256"]) != (len(names), hashlib.sha256(names.blob).hexdigest()):
            return None
        stamps = {str(key): int(stamp) for key, stamp in header["stamps"].items()}
        return (names, stamps, int(header["scanned_ns"])) if stamps else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


# ---- labels


def _label(labels: str, names: list[str], path: str, root: str) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Classes and labels of the images; see `open_source` for `labels`."""
    if labels == "none":
        return (), None
    if labels not in ("auto", "folders"):
        return _number(_from_table(labels, names, root))
    if labels == "auto" and path.lower().endswith(".csv") and any(label is not None for _, label in _read_table(path)):
        return _number(_from_table(path, names, root))
    heads = [name.partition("/")[0] if "/" in name else None for name in names]
    found = set(heads)
    if labels == "auto" and (len(found) < 2 or len(names) < 2 * len(found) or found & {None, "", ".."}):
        return (), None
    if found == {None}:
        raise ValueError(f"labels is 'folders' but no image of '{path}' lies in a sub-folder; use 'auto' or 'none'.")
    return _number(heads)


def _number(values: list[str | None]) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Class names in order (numbers by value) and the position of each value among them, -1 where unknown."""
    known = {value for value in values if value is not None}
    numeric = all(value.isascii() and value.isdecimal() for value in known)
    classes = tuple(sorted(known, key=lambda value: (int(value) if numeric else 0, value)))
    position: dict[str | None, int] = {name: index for index, name in enumerate(classes)}
    return classes, np.array([position.get(value, -1) for value in values], np.int64) if classes else None


def _from_table(labels: str, names: list[str], root: str) -> list[str | None]:
    """The label of each image by a CSV file; None where it has none."""
    table = os.path.abspath(os.path.expanduser(labels))
    if not os.path.isfile(table):
        close = difflib.get_close_matches(labels, ("auto", "folders", "none"), n=1)
        advice = (
            f"did you mean '{close[0]}'" if close else "this is a folder" if os.path.isdir(table) else _nearest(table)
        )
        raise ValueError(f"labels is '{labels}'; it must be 'auto', 'folders', 'none' or a CSV file: {advice}.")
    rows = _read_table(table)
    if not any(label is not None for _, label in rows):
        raise ValueError(f"The labels file '{labels}' has no column of labels; give it the columns path,label.")
    known: dict[str, str | None] = {}
    for folder in (os.path.dirname(table), root):  # relative to the images' folder wins; in a table, the later row
        known |= {normpath(os.path.join(folder, name)): label for name, label in rows}
    keys = [normpath(os.path.join(root, name)) for name in names]
    if known.keys().isdisjoint(keys):
        raise ValueError(
            f"The labels file '{labels}' matches no image: it names e.g. '{rows[0][0]}', the images are e.g. "
            f"'{names[0]}'; write paths relative to the images' folder or to the CSV."
        )
    return [label if (label := known.get(key)) not in ("", "-1") else None for key in keys]


def _read_table(path: str) -> list[tuple[str, str | None]]:
    """(path, label) of each row of a CSV file; every label is None if it has no such column, "" marks an empty one."""
    try:
        rows = [row for row in csv.reader(io.StringIO(_text(path), newline="")) if any(map(str.strip, row))]
    except csv.Error as error:
        raise ValueError(f"'{path}' is not a valid CSV file ({error}); write the columns path,label.") from error
    if not rows:
        return []
    header = [cell.strip().lower() for cell in rows[0]]
    image, label = 0, 1 if len(header) > 1 else None
    if os.path.splitext(header[0])[1] not in IMAGE_SUFFIXES:
        image = next((header.index(name) for name in _PATH_COLUMNS if name in header), None)
        label = next((header.index(name) for name in _LABEL_COLUMNS if name in header), None)
        if image is None:
            raise ValueError(
                f"'{path}' begins with the row {','.join(rows[0])!r}, which is neither an image nor a header with a "
                "column 'path'; write path,label there."
            )
        rows = rows[1:]
    table = [(_cell(row, image), None if label is None else _cell(row, label)) for row in rows]
    return [(name, value) for name, value in table if name]


def _cell(row: list[str], column: int) -> str:
    return row[column].strip() if column < len(row) else ""


def _text(path: str) -> str:
    try:
        text = Path(path).read_bytes().decode("utf-8-sig", "surrogateescape")  # names need not be valid UTF-8
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read: {error.strerror}; check its permissions.") from error
    if "\0" in text:
        raise ValueError(f"'{path}' is not plain text (UTF-16 perhaps); save it as UTF-8.")
    return text
