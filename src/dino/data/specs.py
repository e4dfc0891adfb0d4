"""What `--data` says, for every command: a folder of images or of tar files, a list file, tables, an address of these, one of
the `KINDS` of data with a prefix, or several of these, a line each. `dino.data.open` opens it.

No other module reads such a spec. A new kind of data is a class (a `Source`), a function that opens it, and a line in
`KINDS`. Evaluations that need more than images and classes (masks, videos, copies) know their own folders.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dino import files
from dino.data.decode import IMAGE_SUFFIXES
from dino.data.labels import read_lines
from dino.data.scenes import open_scenes
from dino.data.shards import SUFFIX, is_pattern
from dino.data.sources import Source
from dino.data.storage import is_remote, join
from dino.data.tables import SUFFIX as TABLE_SUFFIX
from dino.data.torchvision_sets import open_torchvision
from dino.options import required
from dino.terminal import say

# Folders of training and of test images in one folder, by their usual names, small or capital.
TRAIN_FOLDERS, TEST_FOLDERS = ("train", "training"), ("val", "valid", "validation", "test", "testing")

HUB = "hf://datasets/"  # begins ORG/NAME or ORG/NAME@REVISION on the hub of Hugging Face

AnyPath = str | os.PathLike[str]


class Kind(NamedTuple):
    """Data whose spec is PREFIX or PREFIX:ARGUMENTS."""

    open: Callable[[str], tuple[Source, Source]]  # training and test images of a spec, labeled
    in_folder: bool  # True: the spec is PREFIX:NAME:FOLDER


KINDS = {"scenes": Kind(open_scenes, in_folder=False), "torchvision": Kind(open_torchvision, in_folder=True)}


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
