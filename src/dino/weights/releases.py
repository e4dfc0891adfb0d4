"""The weights that the paper's authors released: a table, and a cache of downloaded files.

Figures and addresses are those of the reference's README; sizes are those of the tensors. Files come from `BASE` (or
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
from typing import NamedTuple

from dino import errors
from dino.downloads import DownloadError, is_offline
from dino.files import cache_folder
from dino.paper import FIGURES
from dino.terminal import Terminal

BASE = "https://dl.fbaipublicfiles.com/dino"
LICENSE = "Apache-2.0"
ATTEMPTS, TIMEOUT, CHUNK = 3, 30, 1 << 20


class Release(NamedTuple):
    arch: str
    megabytes: int  # of the backbone
    files: dict[str, str]  # part -> path below BASE
    knn: float | None = None  # ImageNet top-1 accuracies, percent
    linear: float | None = None


def _release(model: str, megabytes: int, stem: str, arch: str | None = None) -> Release:
    folder = f"{stem}_pretrain"
    files = {
        "backbone": f"{folder}/{folder}.pth",
        "full": f"{folder}/{folder}_full_checkpoint.pth",
        "linear": f"{folder}/{stem}_linearweights.pth",
    }
    knn, linear = FIGURES["knn"][model]["knn20_top1"], FIGURES["linear"][model]["linear_top1"]
    return Release(arch or model, megabytes, files, knn, linear)


_S8_300, _S16_LANDMARKS = "dino_deitsmall8_300ep_pretrain", "dino_vitsmall16_googlelandmark_pretrain"

RELEASES: dict[str, Release] = {
    "dino_vits16": _release("vit_small/16", 87, "dino_deitsmall16"),
    "dino_vits8": _release("vit_small/8", 87, "dino_deitsmall8"),
    "dino_vitb16": _release("vit_base/16", 343, "dino_vitbase16"),
    "dino_vitb8": _release("vit_base/8", 343, "dino_vitbase8"),
    "dino_resnet50": _release("resnet50", 94, "dino_resnet50"),
    "dino_xcit_small_12_p16": _release("xcit_small_12_p16_224", 104, "dino_xcit_small_12_p16", "xcit_small_12/16"),
    "dino_xcit_small_12_p8": _release("xcit_small_12_p8_224", 103, "dino_xcit_small_12_p8", "xcit_small_12/8"),
    "dino_xcit_medium_24_p16": _release("xcit_medium_24_p16_224", 336, "dino_xcit_medium_24_p16", "xcit_medium_24/16"),
    "dino_xcit_medium_24_p8": _release("xcit_medium_24_p8_224", 335, "dino_xcit_medium_24_p8", "xcit_medium_24/8"),
    # Of its evaluations and example runs: attention pictures, landmark retrieval, ResNet-50 of 100 epochs.
    "dino_vits8_300ep": Release("vit_small/8", 87, {"backbone": f"{_S8_300}/{_S8_300}.pth"}),
    "dino_vits16_landmarks": Release("vit_small/16", 87, {"backbone": f"{_S16_LANDMARKS}/{_S16_LANDMARKS}.pth"}),
    "dino_resnet50_100ep": Release("resnet50", 94, {"full": "example_runs_logs/dino_rn50_checkpoint.pth"}),
}


def find_release(name: str) -> tuple[str, str] | None:
    """Release and part that `name` stands for, e.g. 'dino_vits16', 'vits16', 'vits16:full', 'vits16:linear'."""
    release, _, part = name.partition(":")
    release = release if release.startswith("dino_") else f"dino_{release}"
    if release not in RELEASES:
        return None
    files = RELEASES[release].files
    part = part or next(iter(files))
    if part not in files:
        raise ValueError(f"{release} has no part '{part}'; it has {', '.join(files)}.")
    return release, part


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
