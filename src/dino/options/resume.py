"""What a resumed run may change: neither the mathematics nor the images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dino.options import flatten
from dino.options.train import TrainOptions

# These options and those of `log` may be others.
FREE_ON_RESUME = {
    *("resume", "device", "threads", "stop_after", "report", "data.num_workers", "data.max_bad_fraction"),
    *("fit", "accumulate", "recompute", "compile", "data.decode"),
}
MOVABLE = {"data.path", "data.val", "data.labels"}  # may be elsewhere: images are compared by their names and labels


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
