"""Exports published on the hub of Hugging Face (or on that of $HF_ENDPOINT), by its own client, huggingface_hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from dino import errors
from dino.downloads import is_offline
from dino.version import __version__


class PushError(RuntimeError):
    """The hub refused an export or could not be reached; the message says why and what to do."""


def log_in(repo: str, offline: bool = False) -> HfApi:
    """The client, once the hub knows whose token it has; so that an export is not made in vain.

    Args:
        repo: ORG/NAME.
        offline: refuse, as $DINO_OFFLINE=1 and $HF_HUB_OFFLINE=1 do.

    Raises:
        ValueError: no such name is possible, there is no token, or the network may not be used.
        PushError: the token is not valid, or the hub cannot be reached.
    """
    if is_offline(offline) or constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"--push {repo} needs the network; leave out --offline, unset DINO_OFFLINE and HF_HUB_OFFLINE."
        )
    validate_repo_id(repo)
    api = HfApi(library_name="dino", library_version=__version__)
    with _explain(repo):
        api.whoami()
    return api


def upload(api: HfApi, repo: str, contents: Mapping[str, Path | bytes], private: bool = False) -> None:
    """Write files into a repository, as one commit; it is created if there is none.

    Args:
        contents: files, or what they hold, by their names in the repository.
        private: only its owners see it.

    Raises:
        ValueError: it should be private, and is there already and public.
        PushError: the hub refuses it or cannot be reached.
    """
    with _explain(repo):
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise ValueError(f"--push {repo} is a public repository already; choose another name, or make it private.")
        added = [CommitOperationAdd(name, content) for name, content in contents.items()]
        api.create_commit(repo, added, commit_message=f"Export by dino {__version__}")


@contextlib.contextmanager
def _explain(repo: str) -> Iterator[None]:
    """Around requests: what goes wrong becomes one sentence."""
    page = f"{constants.ENDPOINT}/settings/tokens"
    log_in = f"make one that may write at {page}, then run `hf auth login` or set HF_TOKEN"
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise ValueError(f"--push {repo} needs a token of your account; {log_in}.") from error
    except Exception as error:  # of three HTTP libraries, by the client's version, or something that wraps them
        refused: BaseException | None = error
        while refused is not None and not isinstance(refused, HfHubHTTPError):
            refused = refused.__cause__
        if refused is None and isinstance(error, ValueError):
            raise
        status = refused.response.status_code if refused else 0
        why, remedy = {
            0: (errors.find_reason(error), "check the network and try again"),
            401: ("your token is not valid", log_in),
            403: (f"your token may not write to {repo.split('/')[0]}", f"{log_in}, or choose a name of your own"),
        }.get(status, (f"it answered {status}, {errors.first_line(error)}", "try again later"))
        raise PushError(f"{repo} could not be pushed to {constants.ENDPOINT}: {why}; {remedy}.") from error
