"""Images in tar files, WebDataset's convention: a file, a folder of them, a pattern like shards/{0000..0127}.tar, a list."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from dino.data.decode import IMAGE_SUFFIXES, BadImage, decode
from dino.data.index import Index, Shard, open_index
from dino.data.labels import assign_labels, read_text
from dino.data.listing import is_junk
from dino.data.tar import Entry, read_tar

SUFFIX = ".tar"
_BRACES = re.compile(r"\{([^{}]*)\}")


class Shards:
    """A `Source` of the images in tar files. `name(i)` is SHARD/NAME."""

    def __init__(self, index: Index, classes: tuple[str, ...], labels: np.ndarray | None):
        self.index, self.classes, self.labels, self.bounds = index, classes, labels, index.bounds
        digest = hashlib.sha256(index.fingerprint.encode())
        if labels is not index.labels:
            digest.update(str(classes).encode() + (b"" if labels is None else labels.astype("<i8").tobytes()))
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.index)

    def name(self, index: int) -> str:
        return f"{self.index.shards[self.index.find_shard(index)].name}/{self.index.names[index]}"

    def stamp(self) -> str:
        return hashlib.sha256("\n".join(shard.version for shard in self.index.shards).encode()).hexdigest()

    def read(self, index: int) -> np.ndarray:
        return decode(self.read_bytes(index))

    def read_bytes(self, index: int) -> bytes:
        shard, length = self.index.shards[self.index.find_shard(index)], int(self.index.lengths[index])
        try:
            with open(shard.path, "rb", buffering=0) as file:
                file.seek(int(self.index.offsets[index]))
                content = file.read(length)
        except OSError as error:
            raise BadImage(f"its shard cannot be read ({error.strerror})") from error
        if len(content) < length:
            raise BadImage("its shard has become shorter")
        return content


def find_shards(spec: str) -> list[str] | None:
    """The tar files that a spec of data names, in their order; None where it names something else.

    Raises:
        ValueError: one is missing, or named twice.
    """
    path = os.path.abspath(os.path.expanduser(spec))
    if os.path.isdir(path):
        return _find_in_folder(path)
    patterns = [path]
    if path.lower().endswith(".txt") and os.path.isfile(path):
        patterns = [line for line in map(str.strip, read_text(path).split("\n")) if line and not line.startswith("#")]
        patterns = [os.path.normpath(os.path.join(os.path.dirname(path), line)) for line in patterns]
    if not patterns or not patterns[0].lower().endswith(SUFFIX):
        return None
    found = [file for pattern in patterns for file in _expand(pattern)]
    if missing := [file for file in found if not os.path.isfile(file)]:
        raise ValueError(
            f"of the {len(found)} shards of '{spec}', {len(missing)} are missing, first {missing[0]}; check the path."
        )
    if twice := [file for file, count in Counter(found).items() if count > 1]:
        raise ValueError(f"'{spec}' names {twice[0]} twice; name each shard once.")
    return found


def _find_in_folder(folder: str) -> list[str] | None:
    """The tar files right in a folder, unless it also holds images or folders."""
    try:
        with os.scandir(folder) as entries:
            seen = [(entry.name, entry.is_dir()) for entry in entries if not is_junk(os.fsencode(entry.name))]
    except OSError:  # to be said where images are looked for
        return None
    endings = {os.path.splitext(name)[1].lower() for name, _ in seen}
    if SUFFIX not in endings or IMAGE_SUFFIXES & endings or any(is_folder for _, is_folder in seen):
        return None
    return sorted(os.path.join(folder, name) for name, _ in seen if name.lower().endswith(SUFFIX))


def _expand(pattern: str) -> list[str]:
    """The paths that {0000..0127}, {a,b}, * and ? stand for."""
    braces = _BRACES.search(pattern)
    if braces is None:
        return (sorted(glob.glob(pattern)) or [pattern]) if is_pattern(pattern) else [pattern]
    first, _, last = braces[1].partition("..")
    words = braces[1].split(",")
    if first.isdecimal() and last.isdecimal():
        words = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [path for word in words for path in _expand(pattern[: braces.start()] + word + pattern[braces.end() :])]


def is_pattern(path: str) -> bool:
    """Whether it may stand for several paths."""
    return not os.path.exists(path) and any(sign in path for sign in "{*?")


def open_shards(paths: Sequence[str], labels: str) -> Shards:
    """The images of the tar files at `paths`; see `open_source` for `labels`. 'folders' means those within the shards, too.

    Raises:
        ValueError: one cannot be read, none holds an image, or the labels cannot be what was meant.
    """
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    shards = []
    for path in paths:
        status = os.stat(path)
        shards.append(Shard(path, os.path.relpath(path, root), f"{status.st_size} {status.st_mtime_ns}"))
    index = open_index(shards, _read_shard)
    if labels == "none" or (labels == "auto" and not index.classes):
        return Shards(index, (), None)
    if labels in ("auto", "folders") and index.classes:
        return Shards(index, index.classes, index.labels)
    return Shards(index, *assign_labels(labels, index.names.split(), root, root))


def _read_shard(shard: Shard) -> Iterator[Entry]:
    with open(shard.path, "rb") as file:
        yield from read_tar(file, shard.path)
