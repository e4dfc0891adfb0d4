"""`dino bench`: what each part of training costs on these images and this machine, and which option helps most.

The steps measured are the trainer's own, in turns with steps whose parts are timed and with matrix products, the
machine's limit. Nothing is kept but, if asked for, a JSON file.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from dino import distributed, files, run
from dino.data.decode import BadImage
from dino.data.loader import Batch, ViewBatches, iterate
from dino.data.views import draw_views
from dino.engine import parallel
from dino.engine.train import Trainer
from dino.machine import count_spare_cores, name_device
from dino.options import replace, required
from dino.options.trainings import BenchOptions
from dino.terminal import Terminal
from dino.version import __version__

DATA, LOADER, STEPS = 0.1, 0.2, 0.6  # shares of the seconds asked for; the rest is getting ready
LONGEST_STEP = 0.08  # share of the seconds; a longer step is measured on fewer images
STEP = ("transfer, render", "normalize", "teacher", "student", "backward", "optimizer", "EMA", "other")
ONCE = ("optimizer", "EMA")  # cost the same however many images a step has


def measure_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of `work`, with everything that it starts on the device finished."""
    wait_for(device)
    started = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - started


def wait_for(device: torch.device) -> None:
    torch.get_device_module(device).synchronize()


def measure_matrix_rate(device: torch.device, dtype: torch.dtype = torch.float32, edge: int | None = None) -> float:
    """Floating-point operations per second of products of two square matrices, the limit for any network."""
    on_gpu = device.type != "cpu"
    edge = edge or (8192 if on_gpu else 2048)
    count = 10 if on_gpu else 1  # one takes a GPU little longer than being asked
    square = torch.randn(edge, edge, device=device, dtype=dtype)
    measure_seconds(lambda: square @ square, device)  # the first one also starts the library
    return 2 * edge**3 * count / measure_seconds(lambda: [square @ square for _ in range(count)], device)


def measure_parts(trainer: Trainer, batch: Batch) -> dict[str, float]:
    """Seconds of each part of one step, with everything that a part starts on the device finished."""
    spent: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def time_part(name: str) -> Iterator[None]:
        wait_for(trainer.device)
        started = time.perf_counter()
        yield
        wait_for(trainer.device)
        spent[name] += time.perf_counter() - started

    step = trainer.training_step
    plain, step.time = step.time, time_part
    try:
        whole = measure_seconds(lambda: trainer.take_step(batch), trainer.device)
    finally:
        step.time = plain
    if trainer.device.type == "cpu":  # the workers have rendered
        del spent["transfer, render"]
    spent["other"] = max(0.0, whole - sum(spent.values()))
    return {name: spent[name] for name in STEP if name in spent}


def measure_data(batches: ViewBatches, workers: int, limit: float) -> dict[str, float]:
    """Milliseconds per image of reading with decoding, and of rendering what a worker renders, on one core."""
    threads = torch.get_num_threads()
    if workers:
        torch.set_num_threads(1)  # as in a worker
    images, read, indices, started = [], 0.0, batches.indices(0)[0][:64], time.perf_counter()
    for index in indices:
        begun = time.perf_counter()
        with contextlib.suppress(BadImage):
            images.append(batches.renderer.read(batches.source, int(index)))
            read += time.perf_counter() - begun
        if time.perf_counter() - started > limit / 2:
            break
    if not images:
        raise ValueError(f"none of the first {len(indices)} images could be read; repair them or choose other --data.")
    shapes = np.array([image.shape[:2] for image in images])
    views = draw_views(batches.options, 0, 0, range(len(images)), shapes)
    batches.renderer.prepare(images, views)  # fills caches
    render = measure_seconds(lambda: batches.renderer.prepare(images, views), torch.device("cpu"))
    torch.set_num_threads(threads)
    return {"decode": 1e3 * read / len(images), "render": 1e3 * render / len(images)}


def measure_loader(batches: ViewBatches, workers: int, pin_memory: bool, limit: float) -> float:
    """Images per second that the loader delivers to a process that does nothing else."""
    round_ = max(1, workers)
    ready, count = iterate(batches, 0, 10**6, workers, pin_memory), 0
    for _ in range(round_):
        next(ready)
    started = time.perf_counter()
    while count == 0 or time.perf_counter() - started < limit:
        for _ in range(round_):
            next(ready)
        count += round_
    return count * batches.batch_size / (time.perf_counter() - started)


def measure_step(trainer: Trainer, limit: float) -> dict[str, Any]:
    """Milliseconds per image of a step's parts, images per second of whole steps, and the share of the machine."""
    device, size = trainer.device, trainer.batches.batch_size
    full = trainer.batches[0]
    if not full.prepared:
        raise ValueError(f"no batch can be made of these images, first {full.bad[0][0]}: {full.bad[0][1]}.")
    trainer.step = trainer.plan.total // 2  # away from warm-up and frozen prototypes

    def of(count: int) -> Batch:
        return (
            full if count == size else Batch([g[:, :count].contiguous() for g in full.prepared], full.views, full.bad)
        )

    images = size
    if device.type == "cpu":
        few = min(2, size)
        trainer.take_step(of(few))
        each = measure_seconds(lambda: trainer.take_step(of(few)), device) / few
        images = max(few, min(size, int(LONGEST_STEP * limit / each)))
        split = trainer.training_step.split
        fewer = max(1, round(split.parts * images / size))
        trainer.training_step.set_split(split._replace(parts=fewer))  # as large as those of the whole step
    batch, dtype = of(images), parallel.DTYPES.get(trainer.training_step.precision, torch.float32)
    with FlopCounterMode(display=False) as counter:
        trainer.take_step(batch)
    if trainer.options.compile:
        parallel.compile_networks(trainer.method)
        trainer.take_step(batch)
    several = 5 if device.type != "cpu" else 1  # a GPU works on one step while the next is prepared
    rates, wholes, parts, started = [], [], [], time.perf_counter()
    while len(parts) < 3 or (time.perf_counter() - started < STEPS * limit and len(parts) < 30):
        rates.append(measure_matrix_rate(device, dtype))
        wholes.append(measure_seconds(lambda: [trainer.take_step(batch) for _ in range(several)], device) / several)
        parts.append(measure_parts(trainer, batch))
    ms = {n: 1e3 * statistics.median(p[n] for p in parts) / (size if n in ONCE else images) for n in parts[0]}
    once = sum(ms[name] for name in ONCE)
    whole = max(1e3 * statistics.median(wholes) / images - once * (size - images) / images, 1e-6)
    flops, rate = counter.get_total_flops() / images, statistics.median(rates)
    return {
        "parts": ms,
        "images_measured": images,
        "images_per_second": 1e3 / whole,
        "gflop_per_image": flops / 1e9,
        "matrix_product_gflops_per_second": rate / 1e9,
        "share_of_matrix_product": flops * 1e3 / whole / rate,
    }


def advise(trainer: Trainer, data: dict[str, float], loader: float, step: dict[str, Any]) -> str:
    """The bottleneck, and the option that helps, in one sentence."""
    options, workers = trainer.options, required(trainer.options.data.num_workers)
    rate, share, cores = step["images_per_second"], step["share_of_matrix_product"], count_spare_cores()
    if workers == 0 and loader < 4 * rate:
        part = 100 * rate / (rate + loader)
        return f"Views are made in the training process, {part:.0f} % of its time: use --data.num-workers {cores}."
    if workers and loader < rate:
        delivered = f"{loader:,.0f} images/s from {_workers(workers)}"
        found = f"The data is the bottleneck: {delivered} where the step takes {rate:,.0f}"
        if workers < cores:
            return f"{found}: use --data.num-workers {cores}."
        if data["decode"] > data["render"]:
            on_gpu = trainer.device.type == "cuda" and options.data.decode == "workers"
            device = "let the GPU decode (--data.decode device), " if on_gpu else ""
            return f"{found}, mostly decoding: {device}store the images smaller, or use more cores."
        return f"{found}, mostly rendering: fewer views (--views.num-local), or more cores."
    total = sum(step["parts"].values())
    fixed = sum(step["parts"][name] for name in ONCE) / total
    slowest = max(step["parts"], key=lambda name: step["parts"][name])
    found = f"The step is the bottleneck, most of it {slowest} ({100 * step['parts'][slowest] / total:.0f} %)"
    if fixed > 0.25:
        return f"The step is the bottleneck, {100 * fixed:.0f} % of it optimizer and EMA: use a larger --batch-size."
    if trainer.device.type == "cuda" and trainer.training_step.precision == "fp32":
        return f"{found}, in full precision: use --precision bf16."
    if trainer.device.type == "cpu" and trainer.training_step.precision == "bf16" and share < 0.3:
        return f"{found}, in bf16, which helps little here: use --precision fp32."
    if trainer.training_step.split.recompute != "nothing":
        return f"{found}, with activations computed twice: use --recompute nothing if memory allows."
    if trainer.device.type == "cuda" and share < 0.3:
        compiled = "" if options.compile else "--compile, or "
        return f"{found}, at {100 * share:.0f} % of the machine's matrix-product rate: use {compiled}a larger --batch-size."
    fewer = "fewer views (--views.num-local)" if options.views.num_local else "smaller views (--views.global-size)"
    return f"{found}, at {100 * share:.0f} % of the machine's matrix-product rate: {fewer} or a smaller --model.arch."


def _workers(count: int) -> str:
    return f"{count} worker" + "s" * (count != 1)


def compute_shares(parts: dict[str, float]) -> dict[str, dict[str, float]]:
    total = sum(parts.values())
    return {name: {"ms_per_image": ms, "share": ms / total} for name, ms in parts.items()}


def show(result: dict[str, Any]) -> None:
    table = Table("", "ms/image", "share", title=f"{result['device']}, {result['precision']}", title_justify="left")
    for title, parts in (("a worker", result["data"]), ("the step", result["step"])):
        table.add_section()
        for name, value in parts.items():
            table.add_row(f"{title}: {name}", f"{value['ms_per_image']:.3f}", f"{100 * value['share']:.1f} %")
    console = Console(width=None if os.isatty(1) else 120, highlight=False, soft_wrap=True)
    console.print(table)
    console.print(
        f"Loader {result['loader_images_per_second']:,.1f} images/s with {_workers(result['workers'])}; step "
        f"{result['step_images_per_second']:,.1f} images/s, {result['gflop_per_image']:.1f} GFLOP an image, "
        f"{100 * result['share_of_matrix_product']:.0f} % of this machine's matrix-product rate "
        f"({result['matrix_product_gflops_per_second']:,.0f} GFLOP/s)."
    )
    console.print(result["advice"])


def bench(options: BenchOptions) -> None:
    """Measure, print, and write JSON if asked to; in a temporary run directory that is removed.

    Raises:
        ValueError: what `dino train` would refuse, or several ranks.
    """
    distributed.require_single("bench")
    file = None if options.json is None else Path(options.json)
    if file is not None:
        files.require_folder(file, "--json")
        if file.is_dir():
            raise ValueError(f"--json {file} is a folder; give the name of a file in it.")
    device, terminal = distributed.start(options.device), Terminal(True)
    run.set_threads(options, device)
    with tempfile.TemporaryDirectory() as folder:
        plain = replace(options, dict.fromkeys(("resume", "out", "minutes", "hours")))
        trainer, _ = run.set_up(plain, Path(folder) / "run", device, terminal)
        batches, workers = trainer.batches, required(trainer.options.data.num_workers)
        terminal.say("1/3 decoding and rendering ...")
        data = measure_data(batches, workers, DATA * options.seconds)
        terminal.say(f"2/3 the loader with {_workers(workers)} ...")
        loader = measure_loader(batches, workers, device.type == "cuda", LOADER * options.seconds)
        terminal.say("3/3 teacher, student, backward, optimizer, EMA ...")
        step = measure_step(trainer, options.seconds)
    advice = advise(trainer, data, loader, step)
    result = {
        "device": name_device(device),
        "torch": torch.__version__,
        "dino": __version__,
        "precision": trainer.training_step.precision,
        "batch_size": batches.batch_size,
        "workers": workers,
        "data": compute_shares(data),
        "step": compute_shares(step.pop("parts")),
        "loader_images_per_second": loader,
        "step_images_per_second": step.pop("images_per_second"),
        **step,
        "advice": advice,
    }
    show(result)
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n")
