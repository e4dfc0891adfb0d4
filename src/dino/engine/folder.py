"""The directory of a run: which one it is, the files that a run writes there, and what --overwrite deletes of them."""

from __future__ import annotations

import contextlib
from pathlib import Path

import tomli_w

from dino import files
from dino.data.open import record_files
from dino.data.sources import Source
from dino.data.specs import get_name, make_absolute, split_sources
from dino.data.storage import is_remote
from dino.options import flatten, replace, toml
from dino.options.evaluate import EVALUATIONS
from dino.options.resume import check_resumable, continue_if_there
from dino.options.toml import to_dict
from dino.options.train import AUTO, TrainOptions
from dino.weights import runs

_OF_EVALUATION = (".json", ".safetensors", ".training/latest", ".training/step-????????.pt")
_WRITTEN = [
    *("config.json", "files.jsonl", "teacher.safetensors", "best.safetensors", "metrics.jsonl", "quarantine.jsonl"),
    *("report.html", "checkpoints/latest", "checkpoints/step-????????.pt", "tensorboard/events.out.tfevents.*"),
    *("trackers.json", "evaluations.jsonl", "teachers/step-????????.safetensors"),
    *(f"checkpoints/step-????????.shards/{name}" for name in (".metadata", "state.pt", "__*.distcp")),
    *(f"slurm/{name}" for name in ("train.toml", "*_log.out", "*_submitted.pkl", "*_result.pkl", "*_submission.sh")),
    "slurm/.submission_file_*.sh",
    *(f"{of}/{name}{end}" for of in ("eval", "eval/last") for name in EVALUATIONS for end in _OF_EVALUATION),
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


def name_folder(options: TrainOptions) -> Path:
    """The run directory of a new run.

    Raises:
        ValueError: it is an address, which only `dino train` copies to.
    """
    if options.out is not None and is_remote(options.out):
        raise ValueError(f"--out {options.out} is an address, which only `dino train` itself takes; give a folder.")
    return Path(options.out or f"runs/{get_name(options.data.path)}").expanduser()


def find_options(given: TrainOptions) -> TrainOptions:
    """The options of a new run, or of the one that is continued."""
    options = continue_if_there(given, name_folder(given)) if given.resume == AUTO else given
    if options.resume is not None:
        check_resumable(flatten(toml.read_recorded(options.resume)), options)
    return options


def choose_folder(options: TrainOptions) -> Path:
    """The run directory. Refuses a folder that holds anything but a run, and a run without `overwrite`."""
    if options.resume is not None:
        return Path(options.resume).expanduser()
    folder = name_folder(options)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; give a folder to write the run to.")
    # A run that was killed as it started leaves at most its lock and its file list; `dino submit` writes its logs before.
    early = ("files.jsonl", "slurm")
    if folder.is_dir() and any(child.name[0] != "." and child.name not in early for child in folder.iterdir()):
        if not (folder / "config.toml").exists():
            raise ValueError(f"{folder} is not empty and holds no run; choose another --out.")
        if not options.overwrite:
            raise ValueError(
                f"{folder} already holds a run; continue it with --resume {folder}, replace it with --overwrite, "
                "or choose another --out."
            )
        toml.read_recorded(str(folder))  # else it is another program's config.toml
        written = {path.resolve() for path in list_written(folder)} | {folder.resolve()}
        start = options.init and runs.split_name(options.init)[0]
        named = (*split_sources(options.data.path), *split_sources(options.data.val or ""))
        for given in filter(None, (*named, options.data.labels, start)):
            if Path(given).expanduser().resolve() in written:
                raise ValueError(f"{given} is part of the run that --overwrite would delete; choose another --out.")
    return folder


def prepare(options: TrainOptions, folder: Path, source: Source) -> None:
    """Make the run directory and record the run in it; called last, when all checks have passed."""
    if options.overwrite:
        clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record(options, folder, source)


def record(options: TrainOptions, folder: Path, source: Source) -> None:
    """Write the resolved options and the names of the images, which a resume reads."""
    record_files(source, folder)
    files.write(folder / "config.toml", write_options(options))


def write_options(options: TrainOptions) -> str:
    """Options as TOML that means the same from any working directory, without those that hold for one call only."""
    given, words = flatten(options), (None, "auto", "folders", "none")
    absolute = dict.fromkeys(("data.path", "data.val"), make_absolute)
    absolute |= {"data.labels": files.absolute_if_exists, "init": runs.make_absolute}
    paths = {name: function(given[name]) for name, function in absolute.items() if given[name] not in words}
    words = to_dict(replace(options, paths | dict.fromkeys(("out", "stop_after"))))
    return tomli_w.dumps({name: value for name, value in words.items() if name not in ("overwrite", "dry_run")})
