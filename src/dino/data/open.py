"""What `--data` may be, for every command: a folder of images or of tar files, a list file, one of the `KINDS` of data
with a prefix, or several of these, a line each.

No other module reads such a spec. A new kind of data is a class (a `Source`), a function that opens it, and a line in
`KINDS`. Evaluations that need more than images and classes (masks, videos, copies) know their own folders.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dino import errors, files
from dino.data.decode import IMAGE_SUFFIXES, BadImage
from dino.data.labels import read_lines
from dino.data.listing import save_names
from dino.data.scenes import open_scenes
from dino.data.shards import SUFFIX, find_shards, is_pattern, open_shards
from dino.data.sources import Files, Source, Subset, evenly_spaced, hold_out, open_source
from dino.data.storage import Reader, is_remote, join
from dino.data.tables import SUFFIX as TABLE_SUFFIX
from dino.data.tables import find_tables, open_tables
from dino.data.together import Together
from dino.data.torchvision_sets import open_torchvision
from dino.downloads import fetch_dataset
from dino.options import required
from dino.options.rules import parse_bytes
from dino.options.train import TrainOptions
from dino.terminal import say

MOST_HELD_OUT = 1000  # images
RECORD = "files.jsonl"  # in a run directory: the names of its images
# Folders of training and of test images in one folder, by their usual names, small or capital.
TRAIN_FOLDERS, TEST_FOLDERS = ("train", "training"), ("val", "valid", "validation", "test", "testing")

HUB = "hf://datasets/"  # begins ORG/NAME or ORG/NAME@REVISION on the hub of Hugging Face

AnyPath = str | os.PathLike[str]


class Kind(NamedTuple):
    """Data whose spec is PREFIX or PREFIX:ARGUMENTS."""

    open: Callable[[str], tuple[Source, Source]]  # training and test images of a spec, labeled
    in_folder: bool  # True: the spec is PREFIX:NAME:FOLDER


KINDS = {"scenes": Kind(open_scenes, in_folder=False), "torchvision": Kind(open_torchvision, in_folder=True)}


# --- what a spec says ----------------------------------------------------------------------------------------------


def find_kind(spec: AnyPath) -> Kind | None:
    """The kind of data that `spec` names; None: a folder or a list file."""
    return KINDS.get(os.fspath(spec).partition(":")[0])


def _split_path(spec: AnyPath) -> tuple[str, str]:
    """The spec up to the path in it, and that path; either may be empty."""
    kind, spec = find_kind(spec), os.fspath(spec)
    if kind is None:
        return "", spec
    if not kind.in_folder:
        return spec, ""
    prefix, name, path = [*spec.split(":", 2), "", ""][:3]
    return f"{prefix}:{name}:", path


def split_sources(spec: AnyPath) -> list[str]:
    """The specs of several sources: the lines of `spec`, or of the list file that it names; else `spec` itself."""
    spec = os.fspath(spec)
    if "\n" in spec and not os.path.exists(spec):
        return [line for line in map(str.strip, spec.split("\n")) if line]
    path = os.path.abspath(os.path.expanduser(spec))
    if not path.lower().endswith(".txt") or not os.path.isfile(path):
        return [spec]
    named = [line if find_kind(line) else join(os.path.dirname(path), line) for line in read_lines(path)]
    others = [line for line in named if os.path.splitext(line)[1].lower() not in {*IMAGE_SUFFIXES, SUFFIX}]
    return named if any(find_kind(line) or is_remote(line) or os.path.isdir(line) for line in others) else [spec]


def make_absolute(spec: AnyPath) -> str:
    """`spec` such that it means the same from another working directory."""
    if len(specs := split_sources(spec)) > 1:
        return "\n".join(map(make_absolute, specs))
    head, path = _split_path(spec)
    if is_remote(path):
        return path
    return head + (os.path.abspath(os.path.expanduser(path)) if is_pattern(path) else files.absolute_if_exists(path))


def find_path(spec: AnyPath) -> Path | None:
    """The folder or file of a spec, of a pattern the folder. None: of several, of none (images are made), or elsewhere."""
    if len(split_sources(spec)) > 1 or is_remote(spec):
        return None
    path = os.path.expanduser(_split_path(spec)[1])
    while is_pattern(path):
        path = os.path.dirname(path) or "."
    return Path(path) if path else None


def get_name(spec: AnyPath) -> str:
    """A short name of the data, for a folder: its prefix, the NAME after it, or the name of its folder or list."""
    if len(specs := split_sources(spec)) > 1:
        return "+".join(map(get_name, specs))[:60]
    kind, spec = find_kind(spec), os.fspath(spec)
    words = spec.split(":")[: 2 if kind is not None and kind.in_folder else 1]
    if kind is not None:
        return words[-1]
    if is_remote(spec):
        words = [word for word in re.split(r"[/:]+", spec) if word and not is_pattern(word)]
        return words[-1].partition("@")[0].removesuffix(SUFFIX).removesuffix(TABLE_SUFFIX)
    path = required(find_path(spec)).resolve()
    return (path.name if path.is_dir() else path.stem) or "run"


def split_folders(data: AnyPath, val: AnyPath | None) -> tuple[str, str | None]:
    """Training and test folders of `data` where it holds both (`TRAIN_FOLDERS`); else itself and what was given."""
    data, root = os.fspath(data), Path(os.path.expanduser(data))
    if val is not None or not os.access(root, os.R_OK) or not root.is_dir():
        return data, None if val is None else os.fspath(val)
    folders = {name.lower(): name for name in sorted(os.listdir(root)) if (root / name).is_dir()}
    train, test = (next((n for n in names if n in folders), None) for names in (TRAIN_FOLDERS, TEST_FOLDERS))
    if train is None or test is None:
        return data, None
    unused = [f"{name}/" for key, name in folders.items() if key not in (train, test) and not name.startswith(".")]
    say(
        f"{data}: training images are in {folders[train]}/, test images in {folders[test]}/"
        + (f"; not used: {', '.join(unused[:5])}." if unused else ".")
    )
    return str(root / folders[train]), str(root / folders[test])


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


def open_labeled_pair(data: AnyPath, val: AnyPath | None) -> tuple[Source, Source]:
    """Labeled training and test images that agree on their classes.

    Raises:
        ValueError: there are no class folders, too few images, or the classes differ.
    """
    train, val = split_folders(data, val)
    source, test = _open_labeled_parts(train)
    if len(source.classes) < 2:
        raise ValueError(
            f"--data {data} has one class only, '{''.join(source.classes)}'; give a folder of two classes or more, or one "
            "with such folders train/ and val/."
        )
    if val is not None:
        return _require_same_classes(source, _get_test(*_open_labeled_parts(val)))
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
