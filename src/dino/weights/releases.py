"""The weights that the paper's authors released (`dino.names.RELEASES`), in a cache of downloaded files.

Files come from `BASE` (or
$DINO_RELEASES, a mirror) into $DINO_CACHE (or ~/.cache/dino). No checksums were published, so a file's SHA-256 is recorded
beside it after the download, and checked at every use.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from dino import errors
from dino.downloads import DownloadError, is_offline
from dino.files import cache_folder
from dino.names import RELEASES, find_release
from dino.terminal import Terminal

BASE = "https://dl.fbaipublicfiles.com/dino"
LICENSE = "Apache-2.0"
ATTEMPTS, TIMEOUT, CHUNK = 3, 30, 1 << 20


def locate_cached(file: str) -> Path:
    """Where a release's file lies in the cache, whether it has been downloaded or not."""
    return cache_folder() / Path(file).name


def fetch_release(name: str, offline: bool = False) -> Path:
    """The file of a release, from the cache or downloaded; an interrupted download is continued where it stopped.

    Raises:
        ValueError: no such release.
        DownloadError: not cached and `offline` (or $DINO_OFFLINE=1) or no network; or the file was damaged.
    """
    found = find_release(name)
    if found is None:
        raise errors.unknown("release", name, RELEASES)
    release, part = found
    url = f"{os.environ.get('DINO_RELEASES', BASE).rstrip('/')}/{RELEASES[release].files[part]}"
    path = locate_cached(url)
    recorded = path.with_name(path.name + ".sha256")
    if not path.is_file():
        if is_offline(offline):
            raise DownloadError(f"{name} is not in the cache and downloads are off; put {url} at {path}.")
        if not url.startswith(("https://", "http://")):
            raise ValueError(f"$DINO_RELEASES is {url}; give an address that begins with https:// or http://.")
        path.parent.mkdir(parents=True, exist_ok=True)
        recorded.unlink(missing_ok=True)  # of an earlier file, since deleted
        _download(url, path)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not recorded.is_file():
        recorded.write_text(f"{digest}  {path.name}\n")
    elif (first := recorded.read_text().split()[0]) != digest:
        raise DownloadError(
            f"{path} has changed since it was downloaded (SHA-256 {digest[:12]}, was {first[:12]}); "
            "delete it to download it again."
        )
    return path


def _download(url: str, path: Path) -> None:
    """Download `url` to `path`, by way of `path`.part; after a cut connection it is continued, `ATTEMPTS` times in all."""
    part, reason = path.with_name(path.name + ".part"), ""
    terminal = Terminal(keep=False)
    try:
        for _ in range(ATTEMPTS):
            try:
                _append_rest(url, part, terminal)
                break
            except urllib.error.HTTPError as error:
                if error.code == 416:  # the part is whole already, or of another file
                    part.unlink(missing_ok=True)
                elif error.code < 500:
                    raise DownloadError(f"{url} was refused: {error.code} {error.reason}.") from error
                reason = f"the server answered {error.code} {error.reason}"
            except (OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", error))
        else:
            raise DownloadError(
                f"{url} could not be downloaded: {reason}; check the network and try again (what has arrived is kept), "
                f"or put the file at {path} yourself."
            )
    finally:
        terminal.stop()
    if zipfile.is_zipfile(part) and (bad := zipfile.ZipFile(part).testzip()) is not None:
        part.unlink()
        raise DownloadError(f"{url} arrived damaged ({bad} fails its check); it was deleted, try again.")
    os.replace(part, path)


def _append_rest(url: str, part: Path, terminal: Terminal) -> None:
    """Append to `part` what it lacks of `url`."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with (
        urllib.request.urlopen(request, timeout=TIMEOUT) as response,
        open(part, "ab" if response.status == 206 else "wb") as file,
    ):
        length = response.headers["Content-Length"]
        total = file.tell() + int(length) if length else None
        terminal.start(file.tell(), total)
        while chunk := response.read(CHUNK):
            file.write(chunk)
            terminal.update(file.tell(), part.stem, f"{file.tell() / 1e6:.0f} MB")
        if total not in (None, file.tell()):
            raise ConnectionError(f"the connection was cut after {file.tell():,} of {total:,} bytes")
