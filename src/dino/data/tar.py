"""The images in a tar file, in WebDataset's convention: files of one key, one after the other, are an image and its label.

A file's key is its path up to the first dot of its name: 0042.jpg and 0042.cls belong together.
"""

from __future__ import annotations

import itertools
import json
import os
import posixpath
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from dino.data.decode import IMAGE_SUFFIXES
from dino.data.listing import is_junk

# Members with a label, the best first: a number or name, an object with one of `_JSON_KEYS`, and a line of text.
_LABEL_KINDS = ("cls", "json", "txt")
_JSON_KEYS = ("label", "class", "cls", "class_name")
_LONGEST_LABEL = 100  # characters; a longer text is a caption


class Entry(NamedTuple):
    name: str
    offset: int  # bytes
    length: int
    label: str | None


class _Member(NamedTuple):
    key: str
    ending: str  # what follows the key and its dot
    name: str
    offset: int
    length: int
    content: bytes | None  # of a label


def read_tar(stream: BinaryIO, where: str) -> Iterator[Entry]:
    """The images of the tar file `where`, read from its beginning to its end.

    Raises:
        ValueError: it is no tar file, is compressed, or is cut off.
    """
    for _, group in itertools.groupby(_read_members(stream, where), lambda member: member.key):
        yield from _pair(list(group))


def _read_members(stream: BinaryIO, where: str) -> Iterator[_Member]:
    last = ""
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # pyright: ignore  # which would hold every one that was read
                name = info.name.removeprefix("./")
                if not info.isreg() or any(is_junk(part) for part in os.fsencode(name).split(b"/")):
                    continue
                last = name
                folder, base = posixpath.split(name)
                stem, _, ending = base.partition(".")
                content = None
                if ending.lower() in _LABEL_KINDS and (file := tar.extractfile(info)) is not None:
                    content = file.read(2**20)
                yield _Member(posixpath.join(folder, stem), ending.lower(), name, info.offset_data, info.size, content)
    except tarfile.ReadError as error:
        if last:
            raise ValueError(
                f"{where} is cut off or damaged after '{last}' ({error}); copy it again, or leave it out."
            ) from error
        raise ValueError(
            f"{where} is no plain tar file ({error}); its images are read by their place in it, so unpack what is "
            "compressed (gunzip)."
        ) from error


def _pair(members: list[_Member]) -> Iterator[Entry]:
    """The images among files of one key, with their label. One that is named KEY.jpg goes before KEY.mask.jpg."""
    images = [m for m in members if posixpath.splitext(m.name)[1].lower() in IMAGE_SUFFIXES]
    whole = [m for m in images if f".{m.ending}" in IMAGE_SUFFIXES]
    contents = {m.ending: m.content for m in members if m.content is not None}
    label = next((text for kind in _LABEL_KINDS if (text := _read_label(kind, contents.get(kind))) is not None), None)
    for image in whole or images:
        yield Entry(image.name, image.offset, image.length, label)


def _read_label(kind: str, content: bytes | None) -> str | None:
    if content is None:
        return None
    text = content.decode(errors="replace").strip()
    if kind == "json":
        try:
            found = json.loads(text)
        except ValueError:
            return None
        values = [found[key] for key in _JSON_KEYS if key in found] if isinstance(found, dict) else []
        text = str(values[0]) if values and isinstance(values[0], str | int) else ""
    return text if text and len(text) <= _LONGEST_LABEL and "\n" not in text else None
