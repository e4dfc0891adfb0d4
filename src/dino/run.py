"""`dino.train` and what the commands `train` and `report` do: from options to a run."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dino import distributed, files, weights
from dino.data import device_decode
from dino.data.device_render import choose_renderer
from dino.data.loader import ViewBatches
from dino.data.open import open_training_pair, probe
from dino.data.sources import Source
from dino.data.specs import find_path
from dino.engine import budget, build, fit, init, mirror, parallel, shared
from dino.engine.checkpoint import lock_folder
from dino.engine.folder import choose_folder, find_options, prepare, record, write_options
from dino.engine.presence import watching
from dino.engine.step import Split
from dino.engine.trackers import Guarded, find_tracker
from dino.engine.train import Trainer
from dino.eval import evaluate
from dino.eval.online import OnlineEvaluation
from dino.machine import check_cores, check_workers, count_cores, count_spare_cores, describe_device
from dino.models import Backbone, require_architecture
from dino.options import auto, complete_names, flatten, replace, required, toml
from dino.options.commands import ReportOptions
from dino.options.recipes import choose_base, free_length
from dino.options.rules import parse_bytes
from dino.options.train import TrainOptions
from dino.report.notebook import GrowingCurves, RunFolder, is_notebook
from dino.report.run import Run
from dino.report.verdict import advise_start, judge, warn
from dino.terminal import Terminal
from dino.weights.checkpoints import list_checkpoints, list_sharded


def train(
    recipe: str | os.PathLike[str] | TrainOptions | None = None,
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    out: str | os.PathLike[str] | None = None,
    **changes: Any,
) -> RunFolder:
    """Train, and return the run directory. ``dino.train(resume="runs/a")`` continues run a with its own options.

    Args:
        recipe: a recipe's name, a TOML file or complete options. None: the options of the run to resume, else the demo
            without `data`, else options chosen for the data.
        data: a folder, list file, tar files, 'scenes', or 'torchvision:NAME:FOLDER'; or several of these.
        out: run directory to write.
        changes: any option, e.g. ``epochs=30``, ``model="vit_small"`` or ``lr=1e-3``: by its dotted name, or the last part
            of it where no other option has the same.

    Raises:
        ValueError: an option or the data is unusable, or a run cannot be resumed so; nothing has been written then.
    """
    if not isinstance(recipe, str | os.PathLike | TrainOptions | None):
        raise ValueError(
            f"recipe is {recipe!r}; give a recipe's name or a TOML file, and images as dino.train(data=...)."
        )
    if isinstance(data, Sequence) and not isinstance(data, str):
        data = "\n".join([os.fspath(each) for each in data])
    changes |= {name: value for name, value in (("data", data), ("out", out)) if value is not None}
    changes = complete_names(changes, flatten(TrainOptions()))
    if not isinstance(recipe, TrainOptions):
        recipe = choose_base(recipe, "data.path" in changes, changes.get("resume"), 'dino.train(data="{}")')
    return run_training(replace(free_length(recipe, changes), changes))


def run_training(options: TrainOptions) -> RunFolder:
    """Train with `options` (or continue `options.resume`) to the end, a signal, or `stop_after`."""
    began = time.monotonic()
    with contextlib.ExitStack() as held:
        held.enter_context(distributed.naming_lost_ranks())
        device = distributed.start(options.device)
        held.callback(distributed.stop)
        options, copy = distributed.from_main(lambda: mirror.open_mirror(options))
        options = distributed.from_main(lambda: find_options(options))
        set_threads(options, device)
        if device.type == "cpu" and {options.epochs, options.budget, options.stop_after, options.resume} == {None}:
            options = replace(options, {"minutes": 30})
        terminal = Terminal(distributed.is_main())
        folder = distributed.from_main(lambda: choose_folder(options))
        if options.dry_run:
            distributed.from_main(lambda: print_options(options, device, terminal))
            return RunFolder(folder)
        fresh = distributed.is_main() and not folder.exists()
        distributed.from_main(lambda: held.enter_context(lock_folder(folder)))
        distributed.from_main(lambda: (files.sweep(folder), shutil.rmtree(folder / budget.TRIAL, ignore_errors=True)))
        held.enter_context(watching(folder))
        with files.writing(folder, leave=not fresh):
            shared.check_folder(folder)
            trainer, held_out = set_up(options, folder, device, terminal, began)
        if trainer.step >= trainer.plan.total:
            terminal.say(f"{folder} is complete: nothing is left to train.")
        else:
            terminal.say(
                f"Training on {len(trainer.source)} images ({len(held_out) if held_out else 0} held out), "
                f"{trainer.plan.total} steps of {trainer.options.batch_size}, on {describe_device(device)}; "
                f"run directory {folder}"
            )
        if copy is not None:
            terminal.say(f"After every save it is copied to {copy.address}.")
            trainer.copy = copy.push
        if options.resume is None:
            for text in warn(trainer.options, trainer.plan.total):
                terminal.say(f"Warning: {text}", style="yellow")
            if advice := advise_start(options, len(trainer.source)):
                terminal.say(advice)
        found = RunFolder.of(folder, len(trainer.source))
        if distributed.is_main() and is_notebook():
            trainer.trackers.append(Guarded("the picture above", lambda: GrowingCurves(found)))
        complete = trainer.fit()
        if distributed.is_main():
            finish(trainer, complete, held_out)
            if copy is not None:
                copy.push()
        stopped = not complete and trainer.step < (options.stop_after or trainer.plan.total)
        if stopped and not trainer.signals.requeue and "TORCHELASTIC_RUN_ID" in os.environ:
            # torchrun would take the end of a process without an error for that of all the work. After SIGUSR1 it is that:
            # all ranks have saved and end, and the script that started torchrun queues its job again.
            raise KeyboardInterrupt
        if options.budget is not None and complete:
            terminal.say(f"Took {(time.monotonic() - began) / 60:.1f} of {options.budget / 60:g} minutes.")
    return found


def print_options(options: TrainOptions, device: torch.device, terminal: Terminal) -> None:
    """What a run would be, as TOML on stdout. Nothing is built or written."""
    if options.resume is None:
        with tempfile.TemporaryDirectory() as place:
            source, _ = open_data(options, Path(place))
            start = read_start(options, Path(place))
        terminal.say(describe(source, options.data.path))
        timeless = replace(options, {"minutes": None, "hours": None})
        quiet = Terminal(False)  # the TOML says what is chosen
        chosen = resolve_options(timeless, source, start, device, quiet)
        if options.budget is not None:
            # What depends on the epochs is chosen when the speed has been measured, as the run starts.
            lengths = [replace(timeless, {"epochs": epochs}) for epochs in (1, 10**4)]
            short, long = (flatten(resolve_options(each, source, start, device, quiet)) for each in lengths)
            own = {name: value for name, value in flatten(options).items() if short[name] != long[name]}
            chosen = replace(chosen, own | {"minutes": options.minutes, "hours": options.hours})
            terminal.say(f"How many epochs fit into {options.budget / 60:g} minutes is measured as the run starts.")
        options = chosen
    print(write_options(options), end="")


def set_threads(options: TrainOptions, device: torch.device) -> None:
    if options.threads is not None:
        check_cores("threads", options.threads, 1)
        torch.set_num_threads(options.threads)
    elif device.type == "cpu" and distributed.world_size() == 1:
        # One core stays free for the data worker and other programs: a thread that waits for a busy core slows all others.
        # On two cores, the second thread adds a tenth to a half where nothing else runs, and costs half to three quarters
        # where something does.
        # No more than torch has already, because OMP_NUM_THREADS may limit this user.
        torch.set_num_threads(min(torch.get_num_threads(), count_spare_cores()))


def set_up(
    options: TrainOptions,
    folder: Path,
    device: torch.device,
    terminal: Terminal,
    began: float = 0.0,
    trial: float = 60.0,
) -> tuple[Trainer, Source | None]:
    """Open the data, fill in the options, check everything, and build the trainer of a new or a resumed run.

    Args:
        began: when the command did, on the monotonic clock; the time it may take counts from there.
        trial: seconds at most in which steps are measured, if the time it may take is given.
    """
    source, held_out = shared.share_images(lambda: open_data(options, folder), options.data.path)
    terminal.say(describe(source, options.data.path))
    start = distributed.from_main(lambda: read_start(options, folder))
    frozen = load_frozen(options)

    def make(options: TrainOptions, folder: Path, terminal: Terminal) -> Trainer:
        if frozen is not None:
            options = replace(options, {"head.bottleneck_dim": frozen.embed_dim})
        resolved = resolve_options(options, source, start, device, terminal)
        trainer = build_trainer(resolved, folder, (source, held_out), device, terminal, frozen)
        if start is not None:
            initialize_trainer(trainer, start)
        trainer.distribute()
        return trainer

    if options.budget is not None:
        options = budget.choose_length(options, folder, make, terminal, began, trial)
    trainer = make(options, folder, terminal)
    if options.resume is None:
        distributed.from_main(lambda: prepare(trainer.options, folder, source))
    else:
        if trainer.resume():
            terminal.say(f"Resuming after step {trainer.step} of {trainer.plan.total}.")
            trainer.teachers.save(trainer.step)  # which a kill may have kept the run from writing
        trainer.quarantine.names = distributed.from_main(lambda: renew(trainer, source))
    return trainer, held_out


def open_data(options: TrainOptions, folder: Path) -> tuple[Source, Source | None]:
    """Training and held-out images; those of a resumed run may be elsewhere now."""
    if options.model.arch is not None:
        require_architecture(options.model.arch)
    resumed = options.resume is not None
    if resumed and (path := find_path(options.data.path)) is not None and not path.exists():
        raise ValueError(
            f"--resume {folder}: its images {options.data.path} are not there; if they were moved, say where they are "
            "with --data, and if they have --data.val, with that."
        )
    return open_training_pair(options, folder, trust=resumed)


def read_start(options: TrainOptions, folder: Path) -> weights.Weights | None:
    """The weights of `options.init`; None without it, and for a resumed run that has a checkpoint."""
    kept = folder / "checkpoints"
    if options.init is None or (options.resume is not None and (list_checkpoints(kept) or list_sharded(kept))):
        return None
    return weights.read(options.init, num_heads=options.model.num_heads)


def load_frozen(options: TrainOptions) -> Backbone | None:
    """The teacher that does not learn; None where there is none."""
    name = options.method.frozen
    if name is None:
        return None
    if options.head.bottleneck_dim is not None and options.resume is None:
        raise ValueError("head.bottleneck_dim is as wide as the features of a frozen teacher; leave it out.")
    found = weights.build_backbone(distributed.from_main(lambda: weights.read(name, only_backbone=True)))
    if found.in_channels != options.model.in_channels:
        raise ValueError(
            f"the frozen teacher {name} takes {found.in_channels} channel(s) and the student {options.model.in_channels}; "
            "choose --model.in-channels alike."
        )
    return found


def resolve_options(
    options: TrainOptions, source: Source, start: weights.Weights | None, device: torch.device, terminal: Terminal
) -> TrainOptions:
    """Fill in the open options from the images, the weights to start from and the machine, and check all of them."""
    # Rendering is a tenth of a CPU's step even for the smallest model: one worker is enough, if a core is left for it.
    ranks = distributed.world_size()
    workers = count_spare_cores(ranks) if device.type != "cpu" else int(count_cores() >= 2 * ranks)
    adopted = options if start is None else init.adopt(options, start)
    resolved = auto.resolve(adopted, len(source), probe(source), device.type != "cpu", workers)
    check(resolved, source, device)
    given = flatten(options)
    sharpens = resolved.method.loss == "cross-entropy"  # other losses compare vectors, which have no temperature
    chosen = {
        name: value
        for name, value in flatten(resolved).items()
        if given[name] is None and value is not None and (sharpens or not name.startswith("method.teacher_temp"))
    }
    arch = required(resolved.model.arch)
    if options.init is None and options.resume is None and arch.startswith("timm:"):
        terminal.say(f"{arch} starts with fresh weights; its trained ones, where timm has some: --init {arch}")
    if chosen and options.resume is None:
        shown = {name: f"{value:g}" if isinstance(value, float) else value for name, value in chosen.items()}
        values = ", ".join(f"{name} {value}" for name, value in shown.items())
        terminal.say(f"Chosen for {len(source)} images: {values}")
    return resolved


def build_trainer(
    options: TrainOptions,
    folder: Path,
    data: tuple[Source, Source | None],
    device: torch.device,
    terminal: Terminal,
    frozen: Backbone | None = None,
) -> Trainer:
    """The trainer with fresh weights, its evaluations, and its steps cut to the memory of `options.fit`."""
    more = [evaluate.EvaluationCallback.parse(text, folder) for text in options.log.evaluate]
    trained = options.init is not None
    callback = OnlineEvaluation(*data, options.views, options.seed, device, more, starts_trained=trained)
    batches = build_batches(options, data[0], device)
    trainer = Trainer(options, folder, data[0], batches, device, terminal, callback, frozen)
    if options.fit is not None:
        step, images = trainer.training_step, -(-batches.batch_size // batches.world_size)  # of the rank with most
        split, needed = distributed.gather(fit.fit_memory(step, options, images, parse_bytes(options.fit)))[0]
        step.set_split(split)
        terminal.say(describe_split(split, needed))
    return trainer


def initialize_trainer(trainer: Trainer, start: weights.Weights) -> None:
    """Load the weights to start from, and estimate the center if they have none."""
    trainer.terminal.say(init.initialize(trainer.method, start))
    if init.needs_center(trainer.method, start):
        global_views = replace(trainer.options, {"views.num_local": 0, "data.decode": "workers"})
        count = init.estimate_center(trainer, build_batches(global_views, trainer.source, trainer.device))
        trainer.terminal.say(f"The center is the mean over {count} global views.")


def renew(trainer: Trainer, source: Source) -> set[str]:
    """Write what a kill may have kept a run from writing, and where its images are now; return those in quarantine."""
    if trainer.step:
        trainer.checkpoints.point()
        if isinstance(trainer.callback, OnlineEvaluation):
            trainer.callback.floors_done = True  # before the first step
    trainer.quarantine.reread(source)
    before, now = toml.read_recorded(str(trainer.run)), trainer.options
    if before.data != now.data:
        moved = {f"data.{name}": getattr(now.data, name) for name in ("path", "val", "labels")}
        record(replace(before, moved), trainer.run, source)
    return trainer.quarantine.names


def build_batches(options: TrainOptions, source: Source, device: torch.device) -> ViewBatches:
    renderer = choose_renderer(device, options.data.decode == "device")
    ranks = (distributed.rank(), distributed.world_size())
    return ViewBatches(source, options.views, renderer, required(options.batch_size), options.seed, *ranks)


def check(options: TrainOptions, source: Source, device: torch.device) -> None:
    """Refuse options that contradict the data, the device or the number of processes."""
    if options.data.decode == "device":
        device_decode.check_device(device)
    if options.compile:
        parallel.check_compiler(device)
    check_workers(required(options.data.num_workers))
    for name in options.log.to:
        find_tracker(name)
    batch, ranks = required(options.batch_size), distributed.world_size()
    if batch > len(source):
        raise ValueError(
            f"batch_size is {batch} but there are only {len(source)} images to train on; "
            f"use --batch-size {len(source)} or less."
        )
    if batch < ranks:
        raise ValueError(f"batch_size {batch} leaves some of {ranks} processes without an image; use {ranks} or more.")
    if options.accumulate > batch // ranks:
        raise ValueError(
            f"accumulate is {options.accumulate} but a step has only {batch // ranks} images (of a process); "
            f"use --accumulate {batch // ranks} or less."
        )
    build.check_size(options, batch // ranks, device.type == "cuda")
    if options.method.loss == "infonce" and 0 < required(options.method.queue_size) < 2 * batch:
        raise ValueError(
            f"method.queue_size is {options.method.queue_size}, but each step adds two views of {batch} images; "
            f"use {2 * batch} or more, or 0."
        )


def describe(source: Source, spec: str) -> str:
    labels = f", {len(source.classes)} classes for the k-NN monitor" if source.classes else ", no labels (none needed)"
    return f"{spec.replace(chr(10), ', ')}: {len(source)} images{labels}."


def describe_split(split: Split, needed: float) -> str:
    parts = f"in {split.parts} parts" if split.parts > 1 else "in one part"
    again = "" if split.recompute == "nothing" else f", recomputing {split.recompute} activations"
    return f"Fits: each step {parts}{again}, about {needed / 1e9:.2g} GB."


def finish(trainer: Trainer, complete: bool, held_out: Source | None) -> None:
    """Print the figures that were reached and how to go on, and write the report."""
    folder, terminal = trainer.run, trainer.terminal
    run = Run.read(folder, len(trainer.source))
    if trainer.hurts:
        since = f"from step {trainer.teachers.best.worse[0]} to step {trainer.step}"
        terminal.say(
            f"Ended early: {since} every check found less than the weights that the run started from; they are kept."
        )
    elif not complete:
        terminal.say(f"Stopped and saved after step {trainer.step}.")
    floors = "".join(f"; {what} {value:.1f} %" for what, value in run.floors.items())
    last = run.get_metric("jaccard_mean_map")[1][-1:]
    mean_map = "".join(f"; of the heads' mean map {value:.1f} %" for value in last)
    for key, what, others in (
        (run.knn or "", f"k-NN accuracy (k = {(run.knn or '')[3:5]}) on held-out images", floors),
        ("jaccard_best_head", "Jaccard overlap of the best head's attention mask with the objects", mean_map),
    ):
        before, after = run.compare(key)
        if before is not None and after is not None:
            terminal.say(f"{what}: {before:.1f} % {run.words[0]} -> {after:.1f} % {run.words[1]}{others}")
    for line in judge(run).lines:
        terminal.say(line)
    if best := trainer.teachers.best.found:
        last = "" if best.step == trainer.step else f'; "{folder}:last" is the last'
        terminal.say(f'dino.load("{folder}") takes {best.describe(trainer.step)}{last}.')
    if trainer.options.report:
        from dino.report.page import write_report  # importing it takes a while

        terminal.say(f"Report: {write_report(folder, trainer.source, held_out, trainer.device)}")


def report_command(options: ReportOptions) -> None:
    """Write the report of a run again from the files in its directory, which may lie at an address."""
    from dino.report.page import write_report

    folder = mirror.bring_run(options.run)
    recorded, device = toml.read_recorded(str(folder)), distributed.start("auto")
    set_threads(replace(recorded, {"threads": None}), device)  # which may be more than this machine has
    source, held_out = open_training_pair(recorded, folder, trust=True)
    print(write_report(folder, source, held_out, device))
