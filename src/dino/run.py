"""`dino.train` and what the commands `train` and `report` do: from options to a run."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import tomli_w
import torch

from dino import distributed, files, weights
from dino.data import device_decode
from dino.data.device_render import choose_renderer
from dino.data.loader import ViewBatches
from dino.data.open import find_path, get_name, make_absolute, open_training_pair, probe
from dino.data.sources import Source
from dino.engine import fit, init, log, parallel
from dino.engine.checkpoint import LOCK, Checkpoints, lock_folder
from dino.engine.step import Split
from dino.engine.train import Trainer
from dino.eval import evaluate
from dino.eval.online import OnlineEvaluation
from dino.machine import count_spare_cores, describe_device
from dino.options import auto, flatten, replace, required, toml
from dino.options.commands import ReportOptions
from dino.options.recipes import find_recipe
from dino.options.rules import parse_bytes
from dino.options.toml import to_dict
from dino.options.train import TrainOptions
from dino.terminal import Terminal


def train(
    recipe: str | TrainOptions | None = None, data: str | None = None, out: str | None = None, **changes: Any
) -> Path:
    """Train, and return the run directory.

    Args:
        recipe: a recipe's name or complete options; None: the demo without `data`, else options chosen for the data.
        data: a folder, list file, 'scenes', or 'torchvision:NAME:FOLDER'.
        out: run directory to write.
        changes: any option by its dotted name, e.g. ``epochs=30`` or ``**{"optim.lr": 1e-3}``.

    Raises:
        ValueError: an option or the data is unusable; nothing has been written then.
    """
    if isinstance(recipe, TrainOptions):
        options = recipe
    else:
        options = find_recipe(recipe or "demo").options if recipe or data is None else TrainOptions()
    return run(replace(options, changes | {k: v for k, v in (("data.path", data), ("out", out)) if v is not None}))


def run(options: TrainOptions) -> Path:
    """Train with `options` (or continue `options.resume`) to the end, a signal, or `stop_after`."""
    with contextlib.ExitStack() as held:
        device = distributed.start(options.device)
        held.callback(distributed.stop)
        set_threads(options, device)
        terminal = Terminal(distributed.is_main())
        folder = distributed.from_main(lambda: run_folder(options))
        fresh = distributed.is_main() and not folder.exists()
        distributed.from_main(lambda: held.enter_context(lock_folder(folder)))
        with files.writing(folder, leave=not fresh):
            trainer, held_out = set_up(options, folder, device, terminal)
        terminal.say(
            f"Training on {len(trainer.source)} images ({len(held_out) if held_out else 0} held out), "
            f"{trainer.plan.total} steps of {trainer.options.batch_size}, on {describe_device(device)}; "
            f"run directory {folder}"
        )
        complete = trainer.fit()
        if distributed.is_main():
            finish(trainer, complete, held_out)
    return folder


def set_threads(options: TrainOptions, device: torch.device) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    elif device.type == "cpu" and distributed.world_size() == 1 and count_spare_cores() > 2:
        # One core for the data worker and whatever else runs: threads that wait for a busy core make all of them slow.
        # Never more than torch has: OMP_NUM_THREADS may say how many this user is allowed.
        torch.set_num_threads(min(torch.get_num_threads(), count_spare_cores()))


def set_up(
    options: TrainOptions, folder: Path, device: torch.device, terminal: Terminal
) -> tuple[Trainer, Source | None]:
    """Open the data, choose what was left open, check it all, make or resume the run."""
    source, held_out = distributed.from_main(lambda: open_training_pair(options, folder))
    terminal.say(describe(source, options.data.path))
    edge = probe(source)
    # A CPU that trains has little to spare: rendering is a tenth of a step's work even for the smallest model.
    workers = count_spare_cores(distributed.world_size()) if device.type == "cuda" else int(count_spare_cores() > 2)
    found = distributed.from_main(lambda: starting_weights(options, folder))
    adopted = options if found is None else init.adopt(options, found)
    resolved = auto.resolve(adopted, len(source), edge, device.type == "cuda", workers)
    check(resolved, source, device)
    chosen = {n: v for n, v in flatten(resolved).items() if flatten(options)[n] is None and v is not None}
    if chosen and options.resume is None:
        terminal.say(f"Chosen for {len(source)} images: " + ", ".join(f"{n} {v}" for n, v in chosen.items()))
    more = [evaluate.EvaluationCallback.parse(text, folder) for text in resolved.log.evaluate]
    callback = OnlineEvaluation(source, held_out, required(resolved.views.global_size), device, more)
    batches = view_batches(resolved, source, device)
    trainer = Trainer(resolved, folder, source, batches, device, terminal, callback)
    if resolved.fit is not None:
        step, images = trainer.training_step, batches.batch_size // batches.world_size
        split, needed = distributed.gather(fit.fit_memory(step, resolved, images, parse_bytes(resolved.fit)))[0]
        step.set_split(split)
        terminal.say(describe_split(split, needed))
    if found is not None:
        terminal.say(init.initialize(trainer.method, found))
        if init.needs_center(trainer.method, found):
            globals_only = view_batches(
                replace(resolved, {"views.num_local": 0, "data.decode": "workers"}), source, device
            )
            terminal.say(f"The center is the mean over {init.estimate_center(trainer, globals_only)} global views.")
    distributed.from_main(lambda: prepare(resolved, folder))
    if options.resume is not None and trainer.resume():
        terminal.say(f"Resuming after step {trainer.step} of {trainer.plan.total}.")
    return trainer, held_out


def starting_weights(options: TrainOptions, folder: Path) -> weights.Weights | None:
    """What `options.init` holds; None without it, and for a resumed run that has got beyond its start."""
    if options.init is None or (options.resume is not None and Checkpoints(folder / "checkpoints").latest()):
        return None
    return weights.read(options.init, num_heads=options.model.num_heads)


def run_folder(options: TrainOptions) -> Path:
    """Where the run writes; refuses a folder that holds something else unless told otherwise."""
    if options.resume is not None:
        return Path(options.resume)
    folder = Path(options.out) if options.out is not None else Path("runs") / get_name(options.data.path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; give a folder to write the run to.")
    # A start that was killed early leaves at most its lock and its file list.
    if folder.is_dir() and any(child.name not in ("files.jsonl", LOCK) for child in folder.iterdir()):
        # --overwrite deletes what is there, so it must be a run's and not, say, the photos themselves.
        if not (folder / "config.toml").exists():
            raise ValueError(f"{folder} is not empty and holds no run; choose another --out.")
        if not options.overwrite:
            raise ValueError(
                f"{folder} already holds a run; continue it with --resume {folder}, replace it with --overwrite, "
                "or choose another --out."
            )
        for spec in filter(None, (options.data.path, options.data.val)):
            if (path := find_path(spec)) is not None and folder.resolve() in path.resolve().parents:
                raise ValueError(f"the images {spec} lie inside {folder}, which --overwrite would delete; move them.")
    return folder


def prepare(options: TrainOptions, folder: Path) -> None:
    """Make the run directory with its resolved options; called once nothing can go wrong any more."""
    if options.resume is not None:
        return
    if options.overwrite and folder.exists():
        for child in folder.iterdir():
            if child.name not in ("files.jsonl", LOCK):  # just scanned, and held by this process
                shutil.rmtree(child) if child.is_dir() else child.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    given, words = flatten(options), (None, "auto", "folders", "none")
    absolute = dict.fromkeys(("data.path", "data.val"), make_absolute)
    absolute |= dict.fromkeys(("data.labels", "init"), files.absolute_if_exists)
    paths = {name: function(given[name]) for name, function in absolute.items() if given[name] not in words}
    recorded = replace(options, paths | {"out": None, "overwrite": False})
    (folder / "config.toml").write_text(tomli_w.dumps(to_dict(recorded)))


def view_batches(options: TrainOptions, source: Source, device: torch.device) -> ViewBatches:
    renderer = choose_renderer(device, options.data.decode == "device")
    ranks = (distributed.rank(), distributed.world_size())
    return ViewBatches(source, options.views, renderer, required(options.batch_size), options.seed, *ranks)


def check(options: TrainOptions, source: Source, device: torch.device) -> None:
    """Contradictions that only show once data, device and options are all known."""
    if options.data.decode == "device":
        device_decode.check_device(device)
    if options.compile:
        parallel.check_compiler(device)
    batch, ranks = required(options.batch_size), distributed.world_size()
    if batch > len(source):
        raise ValueError(
            f"batch_size is {batch} but there are only {len(source)} images to train on; "
            f"use --batch-size {len(source)} or less."
        )
    if batch % ranks:
        raise ValueError(f"batch_size {batch} cannot be shared by {ranks} processes; use a multiple of {ranks}.")
    if options.accumulate > batch // ranks:
        raise ValueError(
            f"accumulate is {options.accumulate} but a step has only {batch // ranks} images (of a process); "
            f"use --accumulate {batch // ranks} or less."
        )
    if options.method.loss == "infonce" and options.method.queue_size < 2 * batch:
        raise ValueError(
            f"method.queue_size is {options.method.queue_size}, but each step adds two views of {batch} images; "
            f"use {2 * batch} or more."
        )


def describe(source: Source, spec: str) -> str:
    labels = f", {len(source.classes)} classes for the k-NN monitor" if source.classes else ", no labels (none needed)"
    return f"{spec}: {len(source)} images{labels}."


def describe_split(split: Split, needed: float) -> str:
    parts = f"in {split.parts} parts" if split.parts > 1 else "in one part"
    again = "" if split.recompute == "nothing" else f", recomputing {split.recompute} activations"
    return f"Fits: each step {parts}{again}, about {needed / 1e9:.2g} GB."


def finish(trainer: Trainer, complete: bool, held_out: Source | None) -> None:
    """Say what was reached and how to go on; write the report."""
    folder, terminal = trainer.run, trainer.terminal
    lines = log.read_metrics(folder / "metrics.jsonl")
    measured = [line for line in lines if "effective_rank" in line]
    if not complete:
        terminal.say(f"Stopped and saved after step {trainer.step}. Continue with: dino train --resume {folder}")
    for key, what in (
        ("knn20_top1", "k-NN accuracy (k = 20) on held-out images"),
        ("jaccard_best_head", "Jaccard overlap of attention masks with the objects"),
    ):
        if measured and key in measured[-1]:
            pixels = measured[0].get(f"pixels_{key}")
            floor = f"; on raw pixels {pixels:.1f} %" if pixels is not None else ""
            terminal.say(f"{what}: {measured[0][key]:.1f} % untrained -> {measured[-1][key]:.1f} % trained{floor}")
    if trainer.options.report:
        terminal.say(f"Report: {report(folder, trainer.source, held_out, trainer.device)}")


def report(folder: Path, source: Source, held_out: Source | None, device: torch.device) -> Path:
    from dino.report.page import write

    return write(folder, source, held_out, device)


def report_command(options: ReportOptions) -> None:
    """Write a run's report again from what is in its directory."""
    recorded = replace(toml.read_recorded(options.run), {"resume": options.run})
    device = distributed.start("auto")
    set_threads(recorded, device)
    source, held_out = open_training_pair(recorded, Path(options.run))
    print(report(Path(options.run), source, held_out, device))


# Options that change neither the mathematics nor the data, so that a resumed run may have others.
FREE_ON_RESUME = {
    *("resume", "device", "threads", "stop_after", "report", "data.num_workers", "data.max_bad_fraction"),
    *("fit", "accumulate", "recompute", "compile", "data.decode"),
}


def check_resumable(recorded: TrainOptions, wanted: TrainOptions) -> None:
    """Refuse to continue a run with other mathematics or data than it was started with."""
    before, after = flatten(recorded), flatten(wanted)
    changed = [n for n in after if after[n] != before[n] and n not in FREE_ON_RESUME and not n.startswith("log.")]
    if changed:
        name = changed[0]
        raise ValueError(
            f"--resume continues a run with the options it was started with, but {name} is {after[name]} where it was "
            f"{before[name]}; leave it out, or start a new run with another --out."
        )
