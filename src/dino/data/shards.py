"""Images in tar files, WebDataset's convention: a file, a folder of them, a pattern like shards/{0000..0127}.tar, a list."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dino.data.decode import IMAGE_SUFFIXES, BadImage, decode
from dino.data.index import Index, Shard, open_index
from dino.data.labels import assign_labels, read_lines
from dino.data.listing import look_into
from dino.data.ranges import Unreachable
from dino.data.reader import Reader
from dino.data.sources import Subset
from dino.data.storage import Place, describe_all, find_matching, is_remote, join, read_through
from dino.data.tar import Entry, read_tar
from dino.options import required

SUFFIX = ".tar"
Labels = tuple[tuple[str, ...], np.ndarray | None]
_BRACES = re.compile(r"\{([^{}]*)\}")


class Shards:
    """A `Source` of the images in tar files. `name(i)` is SHARD/NAME.

    Args:
        labeled: whether their labels are known.
        table: classes and labels that are not those of the tar files.
    """

    def __init__(self, index: Index, reader: Reader, labeled: bool, table: Labels | None = None):
        self.index, self.reader, self.labeled, self.table = index, reader, labeled, table
        self.classes = () if not labeled else index.classes if table is None else table[0]
        digest = hashlib.sha256(index.fingerprint.encode())
        if table is not None or not labeled:
            digest.update(
                repr(self.classes).encode() + (b"" if self.labels is None else self.labels.astype("<i8").tobytes())
            )
        self.fingerprint = digest.hexdigest()

    @property
    def labels(self) -> np.ndarray | None:
        if not self.labeled:
            return None
        return self.index.labels if self.table is None else self.table[1]

    @property
    def bounds(self) -> np.ndarray:
        return self.index.bounds

    def __len__(self) -> int:
        return len(self.index)

    def name(self, index: int) -> str:
        return f"{self.index.shards[self.index.find_shard(index)].name}/{self.index.names[index]}"

    def stamp(self) -> str:
        return hashlib.sha256("\n".join(shard.version for shard in self.index.shards).encode()).hexdigest()

    def read(self, index: int) -> np.ndarray:
        return decode(self.read_bytes(index))

    def find_place(self, index: int) -> Place:
        shard = self.index.shards[self.index.find_shard(index)]
        return Place(shard.path, int(self.index.offsets[index]), int(self.index.lengths[index]), shard.version)

    def read_ahead(self, indices: Sequence[int]) -> None:
        self.reader.read_ahead([self.find_place(index) for index in indices])

    def read_bytes(self, index: int) -> bytes:
        place = self.find_place(index)
        try:
            content = self.reader.read(place)
        except Unreachable:
            raise
        except OSError as error:
            raise BadImage(f"its shard cannot be read ({error.strerror or 'it is not there'})") from error
        if len(content) < required(place.length):
            raise BadImage("its shard has become shorter")
        return content


def find_shards(spec: str) -> list[str] | None:
    """The tar files that a spec of data names, in their order; None where it names something else."""
    path = spec if is_remote(spec) else os.path.abspath(os.path.expanduser(spec))
    if path.lower().endswith(SUFFIX):
        return _expand(path)
    if path.lower().endswith(".txt") and os.path.isfile(path):
        lines = [join(os.path.dirname(path), line) for line in read_lines(path)]
        are_shards = bool(lines) and all(line.lower().endswith(SUFFIX) for line in lines)
        return [file for line in lines for file in _expand(line)] if are_shards else None
    inside = look_into(path)
    endings = {os.path.splitext(name)[1].lower() for name in inside}
    if SUFFIX not in endings or IMAGE_SUFFIXES & endings or any(inside.values()):
        return None  # a folder of images in which a tar file lies, or of folders
    return sorted(os.path.join(path, name) for name in inside if name.lower().endswith(SUFFIX))


def find_members(spec: str) -> dict[str, list[str]] | None:
    """The images within tar files that a list names, TAR/NAME on each line, by tar file; None where it is no such list.

    Raises:
        ValueError: some lines name something else.
    """
    path = os.path.abspath(os.path.expanduser(spec))
    if is_remote(spec) or not path.lower().endswith(".txt") or not os.path.isfile(path):
        return None
    lines, members = [*dict.fromkeys(read_lines(path))], {}
    for line in lines:
        shard, inside, name = line.partition(f"{SUFFIX}/")
        if inside and not os.path.isdir(shard := join(os.path.dirname(path), shard + SUFFIX)):
            members.setdefault(shard, []).append(name)
    if members and sum(map(len, members.values())) < len(lines):
        raise ValueError(f"The list '{path}' names images in tar files, and others; write two lists, and --data twice.")
    return members or None


def _expand(pattern: str) -> list[str]:
    """The paths that {0000..0127}, {a,b}, * and ? stand for."""
    braces = _BRACES.search(pattern)
    if braces is None:
        if not is_pattern(pattern):
            return [pattern]
        return find_matching(pattern) or [pattern]
    first, _, last = braces[1].partition("..")
    words = braces[1].split(",")
    if first.isdecimal() and last.isdecimal():
        words = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [path for word in words for path in _expand(pattern[: braces.start()] + word + pattern[braces.end() :])]


def is_pattern(path: str) -> bool:
    """Whether it may stand for several paths."""
    return any(sign in path for sign in "{*?") and not os.path.exists(path)


def open_shards(spec: str, paths: Sequence[str], labels: str, reader: Reader) -> Shards:
    """The images of the tar files at `paths`, which `spec` names; see `open_source` for `labels`.

    'folders' also means the labels within the shards.

    Raises:
        ValueError: one is missing, named twice or cannot be read, none holds an image, or the labels cannot be meant.
    """
    if twice := [path for path, count in Counter(paths).items() if count > 1]:
        raise ValueError(f"'{spec}' names {twice[0]} twice; name each shard once.")
    versions = describe_all(paths)
    if missing := [path for path, version in zip(paths, versions, strict=True) if version is None]:
        raise ValueError(
            f"of the {len(paths)} shards of '{spec}', {len(missing)} are missing, first {missing[0]}; check the path."
        )
    parts = [path.replace("://", ":/") for path in paths]
    root = os.path.commonpath([os.path.dirname(part) for part in parts])
    named = zip(paths, [os.path.relpath(part, root) for part in parts], versions, strict=True)
    shards = [Shard(path, name, version or "") for path, name, version in named]
    index = open_index(shards, _read_shard)
    if labels in ("none", "auto", "folders") and (labels != "folders" or index.classes):
        return Shards(index, reader, labeled=labels != "none" and bool(index.classes))
    return Shards(index, reader, True, assign_labels(labels, index.names.split(), root, root))


def open_members(spec: str, members: Mapping[str, Sequence[str]], labels: str, reader: Reader) -> Subset:
    """The images that `find_members` found in the list `spec`.

    Raises:
        ValueError: one is not there.
    """
    source = open_shards(spec, [*members], labels, reader)
    chosen, bounds = [], source.bounds.tolist()
    for (shard, names), first, end in zip(members.items(), bounds, bounds[1:], strict=False):
        positions = {name: first + i for i, name in enumerate(source.index.names.split(first, end))}
        if missing := [name for name in names if name not in positions]:
            raise ValueError(
                f"{len(missing)} images that '{spec}' names are not in {shard}, first {missing[0]}; correct it."
            )
        chosen += [positions[name] for name in names]
    return Subset(source, chosen)


def _read_shard(shard: Shard) -> Iterator[Entry]:
    with read_through(shard.path) as stream:
        yield from read_tar(stream, shard.path)
