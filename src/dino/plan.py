"""`dino plan`: what a training would be on these images and this machine, before it is one."""

from __future__ import annotations

import datetime
import itertools
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

from dino import distributed, files, run
from dino.data.sources import Source
from dino.engine import budget
from dino.engine.build import Plan
from dino.engine.estimate import DEVICES, LAUNCH, LEAST, MOST, USUAL, Device, count_step
from dino.engine.folder import write_options
from dino.engine.pace import describe_time
from dino.engine.train import Trainer
from dino.features.survey import survey, write_range
from dino.machine import measure_peak_memory, name_device
from dino.models.vit import SIZES
from dino.options import flatten, replace, required
from dino.options.train import TrainOptions
from dino.options.trainings import PlanOptions
from dino.report.verdict import advise_start, warn
from dino.terminal import Terminal

# What runs of the automatic choice reached in thirty minutes on one thread (docs/results.md): images, and the words.
REACHED = (
    (180, "180 photographs of groceries: 48.1 % 10-NN (untrained 25.5, color histograms 34.7)"),
    (1000, "1,000 images of CIFAR-10: 55.9 % 20-NN (untrained 27.2, raw pixels 34.1)"),
    (2400, "2,389 photographs of Caltech: 89.4 % 10-NN (untrained 59.5, raw pixels 69.1)"),
    (5000, "5,000 images of CIFAR-10: 64.1 % 20-NN (untrained 32.0, raw pixels 39.9)"),
)

Rows = list[tuple[str, str]]  # what, and how much


class Cost(NamedTuple):
    """What a run takes, and on what."""

    device: str
    seconds: float
    least: float  # measured: if all steps are as fast as the fastest tenth
    most: float  # or as slow as the slowest tenth
    memory: float  # bytes, at most
    parameters: int  # of the backbone


def plan(options: PlanOptions) -> None:
    """Look at the images, measure some steps, print what a run would be, and write it as options of `dino train`.

    Raises:
        ValueError: what `dino train` would refuse, or several ranks.
    """
    distributed.require_single("plan")
    path = choose_file(options.toml)
    imports = time.time() - psutil.Process().create_time()
    gpu = None if options.gpu == "cpu" else options.gpu
    device, terminal = distributed.start("cpu" if options.gpu == "cpu" else options.device), Terminal(True)
    run.set_threads(options, device)
    given = flatten(options)
    wanted = replace(
        TrainOptions(), {name: given[name] for name in flatten(TrainOptions())} | {"out": None, "resume": None}
    )
    if options.gpu in ("mps", "cpu"):  # devices that are taken only where they are named
        wanted = replace(wanted, {"device": options.gpu})
    if gpu is None and device.type == "cpu" and wanted.epochs is None and wanted.budget is None:
        wanted = replace(wanted, {"minutes": 30})

    def make(options: TrainOptions, folder: Path, terminal: Terminal) -> Trainer:
        return run.set_up(options, folder, device, terminal)[0]

    with tempfile.TemporaryDirectory() as folder:
        if gpu is not None:
            source, held_out = run.open_data(wanted, Path(folder))
            planned, cost = estimate(wanted, source, Path(folder), DEVICES[gpu], terminal)
        else:
            (own := Path(folder, "first")).mkdir()
            first, held_out = run.set_up(wanted, own, device, terminal, time.monotonic(), options.seconds)
            chosen = replace(first.options, {"minutes": None, "hours": None})
            source, planned = first.source, Plan(chosen, first.plan.steps_per_epoch)
            terminal.say("Measuring some steps and a check ...")
            cost = predict(budget.try_out(chosen, Path(folder, "second"), make, options.seconds), planned, imports)
    show("The images", look(source, held_out))
    show("The run, estimated" if gpu else "The run", describe(planned, len(source), cost, options.price))
    advice = advise_start(planned.options, len(source)), advise_less(planned.options)
    for text in filter(None, [*warn(planned.options, planned.total), *advice]):
        print(f"Note: {text}")
    about = f"# dino plan, {datetime.date.today()}: about {describe_time(cost.seconds)} on {cost.device}\n"
    files.write(path, about + write_options(planned.options))
    print(f"Written: {path}. Start it with: dino train {path} --out runs/NAME")


def choose_file(given: str | None) -> Path:
    """The file to write: `given`, or the first of plan.toml, plan-2.toml, ... that is not there.

    Raises:
        ValueError: it is there, or its folder is not.
    """
    names = [given] if given else ["plan.toml", *(f"plan-{number}.toml" for number in range(2, 100))]
    free = [path for name in names if not (path := Path(name).expanduser()).exists()]
    if not free:
        raise ValueError(f"--toml {names[-1]} exists; choose another name, or delete it.")
    files.require_folder(free[0], "--toml")
    return free[0]


def predict(trial: budget.Trial, plan: Plan, imports: float) -> Cost:
    """The cost of the run that is planned, with `imports` the seconds until a program has begun."""
    pace = trial.trainer.pace
    expected = imports + trial.apart + pace.predict(plan, 0, plan.total)
    times = [*pace.blocks]
    least, most = (expected + plan.total * (float(np.quantile(times, share)) - pace.step) for share in (0.1, 0.9))
    device, backbone = trial.trainer.device, trial.trainer.training_step.backbone
    parameters = sum(p.numel() for p in backbone.parameters())
    return Cost(name_device(device), expected, least, most, measure_peak_memory(device), parameters)


def estimate(wanted: TrainOptions, source: Source, folder: Path, gpu: Device, terminal: Terminal) -> tuple[Plan, Cost]:
    """A run on a GPU that is not here, and its cost: its arithmetic, at the share of the peak that others reach."""
    terminal.say(f"Counting the arithmetic of a step for {gpu.name} ...")
    start = run.read_start(wanted, folder)

    def choose(options: TrainOptions, terminal: Terminal) -> Plan:
        chosen = run.resolve_options(options, source, start, torch.device("cuda"), terminal)
        return Plan(chosen, len(source) // required(chosen.batch_size))

    timeless = replace(wanted, {"minutes": None, "hours": None})
    planned = choose(timeless, terminal)
    step = count_step(planned.options)
    usual, least, most = (max(LAUNCH * USUAL, step.flops / gpu.peak) / share for share in (USUAL, MOST, LEAST))
    if wanted.budget is not None:
        fit, enough = wanted.budget / (usual * planned.steps_per_epoch), required(planned.options.epochs)
        if fit > enough:
            print(f"Note: {fit:,.0f} epochs fit into that time; {enough:g} are enough.")
        else:
            planned = choose(replace(timeless, {"epochs": float(f"{fit:.3g}")}), Terminal(False))
    if step.memory > (there := 0.9 * gpu.memory):
        print(
            f"Note: a step needs about {step.memory / 1e9:.2g} GB, and {gpu.name} has {gpu.memory / 1e9:.3g}; train with "
            f"--fit {there / 1e9:.2g}GB, on several GPUs, or a smaller model."
        )
    total = planned.total
    return planned, Cost(gpu.name, total * usual, total * least, total * most, step.memory, step.parameters)


def look(source: Source, held_out: Source | None) -> Rows:
    """What there is to know of the images before a training, from some of them."""
    found = survey([source] if held_out is None else [source, held_out])
    rows = [("number", f"{found.total:,}, of which {found.total - len(source):,} are held out")]
    if source.classes and source.labels is not None:
        counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.classes))
        rows.append(("classes", f"{len(source.classes)}, of {write_range(counts)} images to train on"))
    if "" not in found.formats:
        formats = ", ".join(f"{kind[1:]} {count}" for kind, count in found.formats.most_common(4))
        rows.append(("formats", f"{formats} ({found.of})"))
    if len(found.sides):
        rows.append(("shorter side", f"{write_range(found.sides)} pixels, median {int(np.median(found.sides))}"))
        mean, square = found.colors.mean(axis=0), found.squares.mean(axis=0)
        for what, color in (("mean", mean), ("deviation", np.sqrt(square - mean**2))):
            rows.append((f"{what} of colors", f"{', '.join(f'{value:.2f}' for value in color)} (red, green, blue)"))
    first = f", first {found.bad[0]}" if found.bad else ""
    advice = " (dino duplicates finds all)" if found.copies else ""
    rows.append(("cannot be read", f"{len(found.bad)} {found.of}{first}"))
    return [*rows, ("near-copies", f"{found.copies} {found.of} repeat another of them{advice}")]


def describe(planned: Plan, count: int, cost: Cost, price: float | None) -> Rows:
    """What the run on `count` images is, and what it takes."""
    options = planned.options
    views, model = options.views, options.model
    loss = f"{options.method.loss}" + (f", {options.head.out_dim:,} prototypes" if options.head.prototypes else "")
    of_views = f"2 of {views.global_size} pixels"
    if views.num_local:
        of_views += f" and {views.num_local} of {views.local_size}"
    between = f"{describe_time(cost.least)} to {describe_time(cost.most)}"
    rows = [
        ("model", f"{model.arch}, {cost.parameters / 1e6:.1f} million parameters"),
        ("loss", loss),
        ("views of an image", of_views),
        ("length", f"{options.epochs:,g} epochs of {count:,} images, {planned.total:,} steps of {options.batch_size}"),
        ("time", f"{describe_time(cost.seconds)} ({between}) on {cost.device}"),
        ("memory", f"{cost.memory / 1e9:.2g} GB at most"),
    ]
    if price is not None:
        rows.append((f"cost, at {price:g} an hour", f"{cost.seconds / 3600 * price:.2f}"))
    near = sorted(REACHED, key=lambda each: abs(np.log(each[0] / count)))[:2]
    return [*rows, *(("others, 30 min on a CPU", words) for _, words in near if options.init is None)]


def advise_less(options: TrainOptions) -> str:
    """How much less a step computes with fewer views and with the next smaller ViT; "" where neither is possible."""
    smaller = {larger: arch for arch, larger in itertools.pairwise(SIZES)}
    arch, crops = required(options.model.arch), options.views.num_local
    changes = {"model.arch": smaller.get(arch), "views.num_local": (crops or 0) // 2 or None}
    if options.method.frozen is not None or arch not in SIZES:
        return ""
    whole, parts = count_step(options).flops, []
    for name, value in changes.items():
        if value is not None:
            share = count_step(replace(options, {name: value})).flops / whole
            parts.append(f"{100 * share:.0f} % with --{name.replace('_', '-')} {value}")
    return f"A step computes only {' and '.join(parts)}, but each is likely to learn less." if parts else ""


def show(title: str, rows: Rows) -> None:
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    for row in rows:
        table.add_row(*row)
    Console(width=None if os.isatty(1) else 160, highlight=False).print(table)
