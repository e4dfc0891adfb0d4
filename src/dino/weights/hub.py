"""Weights by name from a hub that speaks Hugging Face's protocol: `timm:NAME` and `hf:ORG/NAME`, each with `@REVISION`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from dino import errors
from dino.downloads import DownloadError, explain, is_offline, page

# The first of these that a repository has. Shards are listed in an index.
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "model.pth")


class Downloaded(NamedTuple):
    """Files of one commit in huggingface_hub's cache."""

    folder: Path
    weights: Path
    pretrained_cfg: dict[str, Any] | None = None  # timm's, of `timm:NAME`


def fetch_named(name: str, offline: bool) -> Downloaded:
    """The files of `timm:NAME` or `hf:ORG/NAME`; errors as for `fetch`."""
    kind, _, rest = name.partition(":")
    if kind == "hf":
        return fetch(rest, offline)
    repository, files, config = find_timm(rest)
    return fetch(repository, offline, files)._replace(pretrained_cfg=config)


def fetch(repository: str, offline: bool, first: tuple[str, ...] = ()) -> Downloaded:
    """Download the weights and configurations of `repository`, "ORG/NAME" or "ORG/NAME@REVISION", or find them in the cache.

    Args:
        first: names of weight files to try before the usual ones.

    Raises:
        DownloadError: it cannot be had; says why, and the page to visit.
    """
    import huggingface_hub
    from huggingface_hub import _CACHED_NO_EXIST
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    name, _, revision = repository.partition("@")
    offline = is_offline(offline)

    def get(file: str, commit: str | None = revision or None) -> Path:
        return Path(huggingface_hub.hf_hub_download(name, file, revision=commit, local_files_only=offline))

    with explain(repository, offline):
        missing: Exception | None = None
        for file in (*first, *FILES):
            try:
                found = get(file)
                break
            except EntryNotFoundError as error:
                if isinstance(error, LocalEntryNotFoundError) and not offline:
                    raise  # the network is gone; each further try would take half a minute
                missing = error
        else:
            if isinstance(missing, LocalEntryNotFoundError):
                raise missing
            raise DownloadError(
                f"{repository} has none of {', '.join((*first, *FILES))} on {page(name)}; give a repository of timm or "
                "transformers weights."
            )
        commit = found.parent.name  # all files of one commit, should the branch move meanwhile
        for file in ("config.json", "preprocessor_config.json"):
            try:
                get(file, commit)
            except LocalEntryNotFoundError:
                if huggingface_hub.try_to_load_from_cache(name, file, revision=commit) is not _CACHED_NO_EXIST:
                    raise  # it may be there, and without it the weights would be read in another way
            except EntryNotFoundError:
                continue
        if found.suffix == ".json":
            for file in list_shards(found):
                get(file, commit)
    return Downloaded(found.parent, found)


def list_shards(index: Path) -> list[str]:
    """The names of the files that an index of shards lists."""
    return sorted({*json.loads(index.read_text())["weight_map"].values()})


def find_timm(name: str) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    """timm's pretrained weights `name`: their repository, unusual files that may hold them, and their configuration.

    Raises:
        ValueError: timm has no such weights.
    """
    import timm
    from timm.models import get_pretrained_cfg

    plain, _, revision = name.partition("@")
    if not timm.is_model(plain):
        raise ValueError(f"timm has no architecture '{plain}'.{errors.did_you_mean(plain, timm.list_models())}")
    try:
        found = get_pretrained_cfg(plain, allow_unregistered=False)
    except RuntimeError:
        found = None
    if found is None or not found.hf_hub_id:
        tags = timm.list_pretrained(f"{plain.partition('.')[0]}.*")
        raise ValueError(
            f"timm has no weights 'timm:{name}'; "
            + (f"it has {', '.join(tags[:8])}." if tags else "use --model.arch for a fresh network.")
        )
    repository = found.hf_hub_id + (f"@{revision}" if revision else "")
    own = found.hf_hub_filename or ""
    files = ("open_clip_model.safetensors", own) if "open_clip" in own else (own,) * bool(own)
    return repository, files, found.to_dict()
