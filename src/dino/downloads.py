"""What downloads share: how they fail, whether they are wanted, and the hub of Hugging Face.

huggingface_hub downloads, keeps and resumes; $HF_TOKEN, $HF_ENDPOINT, $HF_HOME and $HF_HUB_OFFLINE mean what they mean
there. Only configurations, tensors and images are read, never code.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from dino import errors


class DownloadError(Exception):
    """A file could not be downloaded; the message says why and what to do."""


def is_offline(asked: bool) -> bool:
    return asked or os.environ.get("DINO_OFFLINE", "0") not in ("", "0")


def fetch_dataset(repository: str) -> Path:
    """The folder with all files of the data set "ORG/NAME" or "ORG/NAME@REVISION" in huggingface_hub's cache.

    Raises:
        DownloadError: it cannot be had; says why, and the page to visit.
    """
    import huggingface_hub

    name, _, revision = repository.partition("@")
    offline = is_offline(False)
    with explain(f"datasets/{repository}", offline):
        return Path(
            huggingface_hub.snapshot_download(
                name, repo_type="dataset", revision=revision or None, local_files_only=offline
            )
        )


@contextlib.contextmanager
def explain(repository: str, offline: bool) -> Iterator[None]:
    """Raise what huggingface_hub raises as one sentence, and keep it from telling of each of its tries."""
    from huggingface_hub import errors as hub

    name, _, revision = repository.partition("@")
    where, logger = page(name), logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except hub.GatedRepoError as error:
        raise DownloadError(
            f"{name} is gated: ask for access on {where}, then log in with `hf auth login` or set HF_TOKEN."
        ) from error
    except hub.RevisionNotFoundError as error:
        raise DownloadError(f"{name} has no revision '{revision}'; {where}/tree/main lists its branches.") from error
    except hub.RepositoryNotFoundError as error:
        raise DownloadError(
            f"there is no repository {name} that you may read at {where}; check the name, and for a private one log in with "
            "`hf auth login` or set HF_TOKEN."
        ) from error
    except hub.HFValidationError as error:
        raise ValueError(f"'{repository}' is no name of a repository; write ORG/NAME or ORG/NAME@REVISION.") from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        why = "offline mode is on" if offline else f"{where} cannot be reached"
        raise DownloadError(f"{repository} is not in the cache, and {why}; load it once with a network.") from error
    except hub.HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise DownloadError(f"{repository} could not be downloaded ({errors.first_line(error)}).") from error
        raise DownloadError(
            f"{where} refused the token that you are logged in with; log in again with `hf auth login`, or set HF_TOKEN."
        ) from error
    except OSError as error:  # among them what the network raises, and a full disk
        raise DownloadError(
            f"{repository} could not be downloaded from {where} ({errors.find_reason(error)})."
        ) from error
    finally:
        logger.setLevel(level)


def page(name: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{name}"
