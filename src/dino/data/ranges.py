"""Reads many ranges of files elsewhere at once, with retries.

S3's own library takes about a millisecond of the processor for each range, and a small image is decoded in that time. So
the library only signs an address for each file, and the ranges are read there as from any web server: in a sixth of that.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

from dino import errors
from dino.data.storage import TRIES, Place, open_filesystem, try_often

_VALID = 3600  # seconds that a signed address is good for; one is used for half of them
_PATIENCE = 60  # seconds without a byte
_MOST_REFUSED = 3  # batches of ranges in a row that only S3's library could read; then it reads all

_refused: dict[int, int] = {}  # such batches by file system


class Unreachable(OSError):
    """A file elsewhere could not be read, although it was tried for minutes."""


def fetch(places: Sequence[Place]) -> list[bytes]:
    """The bytes at each of the places, of one file system, all asked for at once. What fails is asked for again.

    Raises:
        FileNotFoundError: a file is not there.
        Unreachable: one could not be read.
    """
    system = open_filesystem(places[0].path)[0]
    found: dict[Place, bytes] = {}

    def ask_for_missing() -> None:
        missing = [place for place in places if place not in found]
        paths = [system._strip_protocol(place.path) for place in missing]
        ends = [None if place.length is None else place.offset + place.length for place in missing]
        contents = _read_ranges(system, paths, [place.offset or None for place in missing], ends)
        failed: Exception | None = None
        for place, content in zip(missing, contents, strict=True):
            if isinstance(content, FileNotFoundError):
                raise content
            if isinstance(content, Exception):
                failed = content
            elif place.length not in (None, len(content)):
                failed = OSError(f"{len(content)} of {place.length} bytes of {place.path} came")
            else:
                found[place] = content
        if failed is not None:
            raise failed

    try:
        try_often(ask_for_missing, TRIES)
    except FileNotFoundError:
        raise
    except Exception as error:
        first = next(place.path for place in places if place not in found)
        raise Unreachable(f"{first} cannot be read: {errors.first_line(error)}") from error
    return [found[place] for place in places]


def _read_ranges(
    system: Any, paths: Sequence[str], starts: Sequence[int | None], ends: Sequence[int | None]
) -> list[bytes | Exception]:
    """Bytes from `starts` to `ends` of each file, or the exception that came instead."""
    if "s3" not in system.protocol or _refused.get(id(system), 0) >= _MOST_REFUSED:
        return system.cat_ranges(paths, starts, ends)
    aiohttp = errors.import_optional("aiohttp", f"s3://{paths[0]} needs aiohttp", "data")
    patience = aiohttp.ClientTimeout(total=None, sock_connect=_PATIENCE, sock_read=_PATIENCE)
    web, _ = open_filesystem("https://", encoded=True, client_kwargs={"trust_env": True, "timeout": patience})
    period = int(time.time() // (_VALID // 2))
    found = web.cat_ranges([_sign(system, path, period) for path in paths], starts, ends)
    failed = [i for i, content in enumerate(found) if isinstance(content, Exception)]
    if failed:  # the library knows more: proxies, certificates, who pays, credentials that have become new
        again = system.cat_ranges([paths[i] for i in failed], [starts[i] for i in failed], [ends[i] for i in failed])
        for i, content in zip(failed, again, strict=True):
            found[i] = content
        if len(failed) == len(paths) and not any(isinstance(content, Exception) for content in again):
            _refused[id(system)] = _refused.get(id(system), 0) + 1
            _sign.cache_clear()
            return found
    _refused.pop(id(system), None)
    return found


@functools.lru_cache(maxsize=4096)
def _sign(system: Any, path: str, period: int) -> str:
    """The address at which a file can be read in this `period` without a key."""
    return system.sign(path, expiration=_VALID)
