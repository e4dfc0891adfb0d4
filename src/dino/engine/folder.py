"""The files that a run writes into its directory, by name: all that --overwrite deletes."""

from __future__ import annotations

import contextlib
from pathlib import Path

from dino import files
from dino.options.evaluate import EVALUATIONS

_WRITTEN = [
    *("config.json", "files.jsonl", "teacher.safetensors", "metrics.jsonl", "quarantine.jsonl"),
    *("report.html", "checkpoints/latest", "checkpoints/step-????????.pt", "tensorboard/events.out.tfevents.*"),
    *(f"eval/{name}{end}" for name in EVALUATIONS for end in (".json", ".safetensors", ".training/latest")),
    *(f"eval/{name}.training/step-????????.pt" for name in EVALUATIONS),
    *(f"eval/step-????????/{name}.json" for name in EVALUATIONS),
    "config.toml",  # last: without it, what is left after a kill would be no run
]


def list_written(run: Path) -> list[Path]:
    """The files in the directory `run` that a run and its evaluations have written.

    Raises:
        ValueError: some of them lie behind a link, so they may belong to another run.
    """
    found = [path for pattern in _WRITTEN for path in run.glob(pattern)]
    for path in found:
        if path.parent.resolve() != run.resolve() / path.parent.relative_to(run):
            raise ValueError(
                f"{path.parent} is a link, and --overwrite deletes nothing behind links; delete the link, or choose "
                "another --out."
            )
    return found


def clear(run: Path) -> None:
    """Delete the files that a run has written, and the folders that are empty then. All other files stay."""
    written = list_written(run)
    for path in written:
        path.unlink(missing_ok=True)
    files.sweep(run)
    folders = {parent for path in written for parent in path.parents if run in parent.parents}
    for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
        files.sweep(folder)
        with contextlib.suppress(OSError):  # it is not empty, or a disk is mounted there
            folder.rmdir()
