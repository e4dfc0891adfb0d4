"""What a resumed run may change: neither the mathematics nor the images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dino.options import flatten, replace
from dino.options.toml import read_recorded
from dino.options.train import TrainOptions

# These options and those of `log` may be others.
FREE_ON_RESUME = {
    *("resume", "device", "threads", "dry_run", "stop_after", "report", "data.num_workers", "data.max_bad_fraction"),
    *("fit", "accumulate", "recompute", "compile", "data.decode"),
}
MOVABLE = {"data.path", "data.val", "data.labels"}  # may be elsewhere: images are compared by their names and labels


def continue_if_there(given: TrainOptions, folder: Path) -> TrainOptions:
    """What `--resume auto` means: the options of the run in `folder`, if there is one, else those `given` for a new run.

    The same command so starts a run and continues it. Of options that decide the result, those that are given must be
    those of the run; its length and the weights that it started from are its own.
    """
    if not (folder / "config.toml").is_file():
        return replace(given, {"resume": None})
    usual, own = flatten(TrainOptions()), {"resume", "out", "overwrite", "init", "epochs", "minutes", "hours"}
    named = {name: value for name, value in flatten(given).items() if value != usual[name] and name not in own}
    return replace(read_recorded(str(folder)), named | {"resume": str(folder), "device": given.device})


def check_resumable(before: Mapping[str, Any], wanted: TrainOptions) -> None:
    """Refuse to continue a run with other mathematics than it was started with.

    Args:
        before: options by dotted name as they were then; one that was not set may be missing.
    """
    for name, value in flatten(wanted).items():
        free = name in FREE_ON_RESUME | MOVABLE or name.startswith("log.")
        if value != before.get(name) and not free:
            raise ValueError(
                f"--resume continues a run with the options it was started with, but {name} is {value} where it was "
                f"{before.get(name)}; leave it out, or start a new run with another --out, from these weights with --init "
                f"{wanted.resume}."
            )
