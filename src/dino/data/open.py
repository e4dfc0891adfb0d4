"""The images that a spec of data names (see `dino.data.specs`): to train on and held out, labeled in pairs, or single."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dino import errors
from dino.data.decode import BadImage
from dino.data.image_files import Files, RemoteFiles, open_source
from dino.data.listing import save_names
from dino.data.reader import Reader
from dino.data.shards import SUFFIX, Shards, find_members, find_shards, open_members, open_shards
from dino.data.sources import Source, Subset, evenly_spaced, hold_out
from dino.data.specs import HUB, KINDS, AnyPath, find_kind, get_name, split_folders, split_sources
from dino.data.storage import is_remote
from dino.data.tables import SUFFIX as TABLE_SUFFIX
from dino.data.tables import find_tables, open_tables
from dino.data.together import Together
from dino.downloads import fetch_dataset
from dino.options import required
from dino.options.rules import parse_bytes
from dino.options.train import TrainOptions
from dino.terminal import say

MOST_HELD_OUT = 1000  # images
RECORD = "files.jsonl"  # in a run directory: the names of its images
# --- images --------------------------------------------------------------------------------------------------------


def _open_parts(
    spec: AnyPath,
    labels: str = "auto",
    record: Path | None = None,
    trust: bool = False,
    weights: tuple[float, ...] | None = None,
    reader: Reader | None = None,
) -> tuple[Source, Source | None]:
    """The training and the test images of a spec; a folder, list (see `open_source`) or shards have no test images."""
    specs = split_sources(spec)
    if weights is not None and len(weights) != len(specs):
        raise ValueError(
            f"data.weights gives {len(weights)} numbers for {len(specs)} sources of images; give one for each --data."
        )
    if len(specs) > 1:
        opened = [
            _open_parts(each, labels, record and record.with_stem(f"{record.stem}-{number}"), trust, reader=reader)[0]
            for number, each in enumerate(specs)
        ]
        names = [get_name(each) for each in specs]
        return Together(opened, names if len({*names}) == len(names) else specs, weights), None
    kind, spec = find_kind(specs[0]), specs[0]
    prefix = spec.partition(":")[0]
    reader = reader or Reader()
    if kind is None and not is_remote(spec) and prefix.isalpha() and prefix != spec and not os.path.exists(spec):
        raise errors.unknown("kind of data", prefix, KINDS)
    if kind is not None:
        return kind.open(spec)
    if spec.startswith(HUB):
        folder = fetch_dataset(spec.removeprefix(HUB))
        tables, shards = ([*map(str, sorted(folder.rglob(f"*{suffix}")))] for suffix in (TABLE_SUFFIX, SUFFIX))
        if tables:
            return open_tables(spec, tables, labels)
        return (open_shards(spec, shards, labels, reader) if shards else open_source(folder, labels)), None
    if (tables := find_tables(spec)) is not None:
        return open_tables(spec, tables, labels)
    if (members := find_members(spec)) is not None:
        return open_members(spec, members, labels, reader), None
    shards = find_shards(spec)
    if shards is None:
        return open_source(spec, labels, record, trust, reader), None
    return open_shards(spec, shards, labels, reader), None


def _get_test(train: Source, test: Source | None) -> Source:
    """What a spec that was given for testing means: its test images where it has such, else all of them."""
    return train if test is None else test


def open_images(spec: AnyPath) -> Source:
    """The images of a folder or list, or the training images of a kind of data."""
    return _open_parts(spec)[0]


def open_training_pair(options: TrainOptions, folder: Path | None, trust: bool = False) -> tuple[Source, Source | None]:
    """Training and held-out images; with `trust`, those of a folder or list are the files recorded in the run's `folder`."""
    data, record = options.data, None if folder is None else folder / RECORD
    path, val = split_folders(data.path, data.val)
    reader = Reader(parse_bytes(data.cache) if data.cache else 0)
    train, test = _open_parts(path, data.labels, record, trust, data.weights, reader)
    if isinstance(train, Files) and not train.classes:
        _say_places(path, train)
    if val is not None:
        held_out = _get_test(*_open_parts(val, data.labels))
        if data.val is not None or held_out.classes or not train.classes:
            return _require_same_classes(train, held_out)
        say(f"{val} has no class folders, so some images of {path} are held out in its place.")
    return hold_out(train, data.val_fraction, MOST_HELD_OUT, options.seed) if test is None else (train, test)


def record_files(source: Source, folder: Path) -> None:
    """Write the names of the files of `source` into the run directory `folder`, for its resume."""
    while isinstance(source, Subset):
        source = source.source
    parts = {RECORD: source}
    if isinstance(source, Together):
        record = Path(RECORD)
        parts = {f"{record.stem}-{number}{record.suffix}": part for number, part in enumerate(source.sources)}
    for name, part in parts.items():
        if isinstance(part, Files):
            save_names(folder / name, part.path, part.names)


def require_files(source: Source) -> None:
    """Refuse images that the lines of one list cannot name.

    Raises:
        ValueError: they are rows of a table, or drawn; or some are files and some lie in tar files.
    """
    kinds, sources = set(), [source]
    while sources:
        one = sources.pop()
        sources += [one.source] if isinstance(one, Subset) else one.sources if isinstance(one, Together) else []
        kinds |= set() if isinstance(one, Subset | Together) else {type(one)}
    if not kinds <= {Files, RemoteFiles, Shards}:
        raise ValueError(
            "these images are no files and lie in no tar files, so no list can name them; write them as files."
        )
    if len(kinds) > 1:
        raise ValueError(
            "these images lie in different kinds of places, which one list cannot name; embed each source apart."
        )


def name_in_list(source: Source, position: int) -> str:
    """The line of a list file that names an image, of a source that `require_files` takes."""
    while isinstance(source, Subset | Together):
        if isinstance(source, Subset):
            source, position = source.source, source.locate(position)
        else:
            number, position = source.locate(position)
            source = source.sources[number]
    assert isinstance(source, Files | Shards)
    path = source.find_place(position).path
    line = f"{path}/{source.index.names[position]}" if isinstance(source, Shards) else path
    if line != line.strip() or "\n" in line:
        raise ValueError(
            f"the name {line!r} begins or ends with a space or holds a line break, so no list can hold it; rename it."
        )
    return line


def _say_places(spec: str, source: Source) -> None:
    """Name the folders that unlabeled images come from: some may hold pictures that are no data."""
    heads = (source.name(i).partition("/") for i in range(len(source)))
    places = Counter(f"{head}/" if slash else "the folder itself" for head, slash, _ in heads)
    if len(places) > 1:
        named = ", ".join(f"{place} ({count:,})" for place, count in places.most_common(5))
        say(f"{spec}: the images come from {named}{', ...' if len(places) > 5 else ''}.")


# --- labeled images ------------------------------------------------------------------------------------------------


def _open_labeled_parts(spec: str) -> tuple[Source, Source | None]:
    """As `_open_parts`; of a folder only the images that lie in one of its class folders."""
    source, test = _open_parts(spec, "folders")
    labels = required(source.labels)
    if (labels >= 0).all():
        return source, test
    say(f"{(labels < 0).sum()} images of {spec} lie in no class folder and are left out.")
    return Subset(source, np.flatnonzero(labels >= 0)), test


def open_labeled_test(data: AnyPath) -> Source:
    """Labeled images to show: the test images where `data` has such, else all of it."""
    train, val = split_folders(data, None)
    return _get_test(*_open_labeled_parts(val or train))


def open_labeled(data: AnyPath, val: AnyPath | None) -> tuple[Source, Source | None]:
    """Labeled images, and those for testing if there are such, `val` or a part of `data`; they agree on their classes.

    Raises:
        ValueError: there are no class folders, or the classes differ.
    """
    train, val = split_folders(data, val)
    source, test = _open_labeled_parts(train)
    if len(source.classes) < 2:
        raise ValueError(
            f"--data {data} has one class only, '{''.join(source.classes)}'; give a folder of two classes or more, or one "
            "with such folders train/ and val/."
        )
    return (source, test) if val is None else _require_same_classes(source, _get_test(*_open_labeled_parts(val)))


def open_labeled_pair(data: AnyPath, val: AnyPath | None) -> tuple[Source, Source]:
    """Labeled training and test images that agree on their classes; without test images, a tenth is set aside.

    Raises:
        ValueError: there are no class folders, too few images, or the classes differ.
    """
    source, test = open_labeled(data, val)
    if test is None:
        source, test = hold_out(source, 0.1, MOST_HELD_OUT, 0)
    if test is None:
        raise ValueError(f"--data {data} holds too few images to set some aside; give test images with --val.")
    return source, test


def _require_same_classes(train: Source, test: Source) -> tuple[Source, Source]:
    """Both, if their class numbers mean the same; numbers are given by each folder on its own."""
    if train.classes and test.classes and train.classes != test.classes:
        only = min(set(train.classes) ^ set(test.classes))
        raise ValueError(
            f"training and held-out images differ in their classes, for example '{only}'; make them agree "
            "(training also works with --data.labels none)."
        )
    return train, test


# --- before any work is spent --------------------------------------------------------------------------------------


def probe(source: Source, most: int = 16) -> int:
    """The median of the shorter sides of a few images, pixels.

    Raises:
        ValueError: none of them can be read.
    """
    edges, reasons = [], []
    for i in evenly_spaced(len(source), most):
        try:
            edges.append(min(source.read(i).shape[:2]))
        except BadImage as error:
            reasons.append(f"{source.name(i)}: {error.reason}")
    if not edges:
        raise ValueError(
            f"none of the {len(reasons)} images tried can be read (for example {reasons[0]}); check the data folder."
        )
    return int(np.median(edges))


def expand_images(images: Sequence[AnyPath]) -> Iterator[tuple[str, bool]]:
    """Each image once, as an absolute path, and whether it was named itself rather than found in a folder."""
    found: dict[str, bool] = {}
    for spec in images:
        path = os.path.abspath(os.path.expanduser(spec))
        if os.path.isdir(path) or path.lower().endswith((".txt", ".csv")):
            source = open_source(spec, labels="none")
            for i in range(len(source)):
                found.setdefault(os.path.normpath(os.path.join(source.root, source.name(i))), False)
        elif not os.path.exists(path):
            raise ValueError(f"there is no image '{spec}'; check the path.")
        else:
            found[path] = True
    if not found:
        raise ValueError("no image was given; name image files or folders.")
    yield from found.items()
