"""`dino doctor`: what is wrong with this machine, with a folder of images, or with a run, and the command that helps."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import psutil
import torch
from huggingface_hub import constants
from packaging.requirements import Requirement
from rich.console import Console
from rich.text import Text

from dino import distributed
from dino.data.open import open_images, open_training_pair
from dino.engine.checkpoint import LOCK, lock_folder
from dino.features.survey import survey, write_range
from dino.machine import count_cores
from dino.options import replace, toml
from dino.options.commands import DoctorOptions
from dino.options.train import TrainOptions
from dino.report.run import Run
from dino.report.verdict import advise_start, judge
from dino.version import __version__
from dino.weights.checkpoints import CheckpointError, list_checkpoints, list_sharded, read_newest

EXTRAS = {
    "app": "the explorer (dino app)",
    "data": "images at s3:// and https:// addresses, and in tables",
    "export": "models as ONNX and for transformers (dino export)",
    "figures": "maps of classes (dino figure)",
    "gpu": "JPEG files decoded by a GPU (--data.decode device)",
    "heif": "HEIC photographs, as iPhones take them",
    "search": "embeddings in files and their search (dino embed, search, duplicates, outliers)",
    "slurm": "jobs of Slurm (dino submit)",
    "tracking": "metrics for Weights & Biases, MLflow and Trackio (--log.to)",
    "video": "video files (dino video)",
}
GB = 1e9
Level = Literal["good", "note", "bad"]
MARKS: dict[Level, tuple[str, str]] = {"good": ("ok", "green"), "note": ("!", "yellow"), "bad": ("X", "bold red")}


class Finding(NamedTuple):
    """Something that was looked at.

    Args:
        help: what to do about it, where something is.
    """

    level: Level
    text: str
    help: str = ""


def doctor(options: DoctorOptions) -> int:
    """Print what was found; 1 where something is bad.

    Raises:
        ValueError: `options.target` is neither a run nor images.
    """
    distributed.require_single("doctor")
    target = options.target
    if not target:
        findings = examine_machine()
    elif (Path(target).expanduser() / "config.toml").is_file():
        findings = examine_run(Path(target).expanduser())
    else:
        findings = examine_images(target)
    console, worst = Console(highlight=False, soft_wrap=True), 0
    for level, text, help in findings:
        mark, style = MARKS[level]
        console.print(Text(f"{mark:>2}", style), text, markup=False)
        if help:
            console.print(f"     -> {help}", markup=False)
        worst = max(worst, level == "bad")
    return int(worst)


# --- the machine -----------------------------------------------------------------------------------------------------


def examine_machine() -> Iterator[Finding]:
    """Versions, devices, cores, memory, disks, the network and optional packages."""
    yield Finding("good", f"dino {__version__}, Python {platform.python_version()}, PyTorch {torch.__version__}")
    yield from examine_devices()
    yield from examine_cores()
    yield from examine_space()
    yield examine_network()
    yield from examine_extras()


def examine_devices() -> Iterator[Finding]:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            text = f"{torch.cuda.get_device_name(index)}: {free / GB:.0f} of {total / GB:.0f} GB are free"
            taken = free < 0.7 * total
            yield Finding("note" if taken else "good", text, "See who has the rest: nvidia-smi" if taken else "")
        return
    listing = shutil.which("nvidia-smi")
    if listing and subprocess.run([listing, "-L"], capture_output=True, check=False).stdout.strip():
        text = f"There is an NVIDIA GPU, but this PyTorch cannot use it (built for CUDA {torch.version.cuda})"
        yield Finding("bad", text, "Install the PyTorch of your driver's CUDA version: https://pytorch.org/get-started")
    elif torch.backends.mps.is_available():
        yield Finding("note", "An Apple GPU; dino takes it only by name, and was never tried on one", "--device mps")
    else:
        yield Finding("good", "No GPU: training takes the recipe for a CPU, and minutes (dino plan --gpu h100: on one)")


def examine_cores() -> Iterator[Finding]:
    cores, everyone = count_cores(), os.cpu_count() or 1
    yield Finding("good", f"{cores} of {everyone} CPU cores, {torch.get_num_threads()} threads")
    with contextlib.suppress(OSError, ValueError):  # no Linux container of today
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if int(quota) < 0.9 * cores * int(period):
            allowed = int(quota) / int(period)
            text = f"This container may use {allowed:.1f} of its {cores} cores; threads beyond that wait for each other"
            yield Finding("note", text, f"Train with --threads {max(1, int(allowed))}")
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if busy > 0.6 * cores:
        yield Finding("note", f"Other programs keep about {busy:.1f} of {cores} cores busy; training will be slower")


def examine_space() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    scarce = memory.available < 2 * GB
    text = f"{memory.available / GB:.1f} of {memory.total / GB:.1f} GB of memory are free"
    yield Finding("bad" if scarce else "good", text, "Close other programs, or train with --fit 1GB" if scarce else "")
    yield examine_disk(Path.cwd(), 5 * GB, "Free some space, or write runs elsewhere: --out")
    if Path("/dev/shm").is_dir():
        advice = "Start the container with --shm-size=2g, or train with --data.num-workers 0"
        yield examine_disk(Path("/dev/shm"), 0.5 * GB, advice)
    if sys.platform == "linux":  # elsewhere psutil does not know it
        files = psutil.Process().rlimit(psutil.RLIMIT_NOFILE)[0]
        few = 0 <= files < 1024
        text = f"A program may open {'any number of' if files < 0 else files} files"
        text += "; many data workers need more" if few else ""
        yield Finding("note" if few else "good", text, "ulimit -n 4096" if few else "")


def examine_disk(folder: Path, enough: float, help: str) -> Finding:
    free = shutil.disk_usage(folder).free
    level: Level = "good" if free >= enough else "note" if free >= enough / 5 else "bad"
    return Finding(level, f"{free / GB:.1f} GB are free in {folder}", "" if level == "good" else help)


def examine_network() -> Finding:
    if constants.is_offline_mode():
        return Finding("note", "HF_HUB_OFFLINE is set: weights by name come from the cache only")
    place = urlsplit(constants.ENDPOINT)
    port = place.port or (443 if place.scheme == "https" else 80)
    try:
        socket.create_connection((place.hostname or "", port), timeout=3).close()
    except OSError as error:
        text = f"{constants.ENDPOINT} cannot be reached ({error.strerror or error}): no weights by name"
        return Finding(
            "note", text, "Without a network, copy files here and give their path, or set HF_ENDPOINT to a mirror"
        )
    return Finding("good", f"{constants.ENDPOINT} answers: weights by name can be downloaded")


def examine_extras() -> Iterator[Finding]:
    needed: dict[str, list[str]] = {extra: [] for extra in EXTRAS}
    for text in importlib.metadata.requires("dino-vision") or []:
        requirement = Requirement(text)
        for extra, missing in needed.items():
            if requirement.marker and requirement.marker.evaluate({"extra": extra}) and not is_installed(requirement):
                missing.append(requirement.name)
    there = [extra for extra, missing in needed.items() if not missing]
    if there:
        yield Finding("good", f"Installed extras: {', '.join(there)}")
    for extra, missing in needed.items():
        if missing:
            text = f"Not installed: {', '.join(missing)}, for {EXTRAS[extra]}"
            yield Finding("note", text, f"pip install 'dino-vision[{extra}]'")


def is_installed(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        return False


# --- images ----------------------------------------------------------------------------------------------------------


def examine_images(spec: str) -> Iterator[Finding]:
    source = open_images(spec)
    found, named = survey([source]), shlex.quote(spec)
    few = advise_start(replace(TrainOptions(), {"data.path": spec}), len(source))
    yield Finding("note" if few else "good", f"{found.total:,} images", few)
    if source.classes and source.labels is not None:
        counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.classes))
        small = int((counts < 2).sum())
        text = f"{len(source.classes)} classes of {write_range(counts)} images (training never sees labels)"
        yield Finding("note" if small else "good", text, f"{small} of one image cannot be measured" if small else "")
    else:
        yield Finding("good", "No labels, which training does not need; accuracy cannot be measured then")
    if found.bad:
        level: Level = "bad" if len(found.bad) > 0.01 * found.looked else "note"
        text = f"{len(found.bad)} {found.of} cannot be read, first {found.bad[0]}"
        yield Finding(level, text, "Training skips them up to --data.max-bad-fraction; repair or delete them")
    else:
        yield Finding("good", f"All {found.looked:,} looked at can be read")
    if not len(found.sides):
        return
    side = int(np.median(found.sides))
    text = f"Shorter sides of {write_range(found.sides)} pixels, median {side}"
    large = "Decoding them will take most of the time: store copies with a shorter side of 512" if side > 1500 else ""
    yield Finding("note" if large or side < 32 else "good", text, large or ("They show little" if side < 32 else ""))
    if np.ptp(found.colors, axis=1).max() < 1 / 255:
        yield Finding("note", "All are gray", "One channel is faster: --model.in-channels 1")
    advice = f"Keep one of each: dino select {named} --help; all groups: dino duplicates {named}"
    many = found.copies > 0.02 * found.looked
    text = f"{found.copies} {found.of} are near-copies of others of them"
    yield Finding("note" if many else "good", text, advice if many else "")


# --- runs ------------------------------------------------------------------------------------------------------------


def examine_run(folder: Path) -> Iterator[Finding]:
    """Whether it can go on, what it waits for, whether it learns, and the verdict of its report."""
    options = toml.read_recorded(str(folder))
    running = False
    if os.access(folder / LOCK, os.W_OK):
        try:
            with lock_folder(folder):
                pass
        except ValueError:
            running = True
    try:
        images = len(open_training_pair(options, folder, trust=True)[0])
    except ValueError as error:
        yield Finding("bad", f"Its images: {error}", f"If they moved: dino train --resume {folder} --data NEW")
        return
    run = Run.read(folder, images)
    yield examine_progress(run, running)
    yield from examine_files(run)
    yield from examine_rates(run, running)
    for step, text in run.list_warnings():
        yield Finding("bad" if step in run.collapses else "note", f"Step {step:,}: {text}")
    if len(run.lines) < 2:
        yield Finding("note", "Nothing has been measured yet")
        return
    verdict = judge(run)
    levels: dict[str, Level] = {"better": "good", "not": "bad", "unknown": "note"}
    why = f"{verdict.reason.text} Next: {verdict.reason.command}" if verdict.reason else ""
    yield Finding(levels[verdict.outcome], f"Verdict: {verdict.headline}", why)


def examine_progress(run: Run, running: bool) -> Finding:
    done = f"step {run.steps:,} of {run.total:,}"
    if running:
        return Finding("good", f"It is running, at {done}")
    if run.complete or (run.folder / "report.html").is_file():
        return Finding("good", f"It is complete ({done})" if run.complete else f"It ended early, at {done}")
    return Finding("note", f"It stopped at {done}", f"dino train --resume {shlex.quote(str(run.folder))}")


def examine_files(run: Run) -> Iterator[Finding]:
    """The checkpoints, the space for more of them, and images that could not be read."""
    folder = run.folder / "checkpoints"
    try:
        newest = read_newest(folder)
    except CheckpointError as error:
        yield Finding("bad", f"Checkpoints: {error}", "Its last teacher may be whole: dino.load of teacher.safetensors")
    else:
        there = newest is not None or bool(list_sharded(folder))
        text = f"It can be resumed from step {newest.state['step']:,}" if newest else "It has no checkpoint yet"
        yield Finding("good" if there else "note", "It can be resumed from shards" if there and not newest else text)
        size = max((path.stat().st_size for path in list_checkpoints(folder)), default=0)
        yield examine_disk(run.folder, 4 * size, "Free some space: a checkpoint needs it while it is written")
    if run.quarantine:
        text = f"{len(run.quarantine)} images could not be read; they are listed in quarantine.jsonl"
        yield Finding("note", text, "Repair them, then resume")


def examine_rates(run: Run, running: bool) -> Iterator[Finding]:
    """What the steps wait for, and whether they became slower."""
    waits, rates = (run.get_metric(name)[1][-20:] for name in ("data_wait_share", "images_per_second"))
    if not rates:
        return
    wait, rate, usual = float(np.median(waits)), float(np.median(rates[-3:])), float(np.median(rates))
    text = f"{rate:,.0f} images/s, {100 * wait:.0f} % of the time waiting for images"
    if wait > 0.3:
        advice = f"Resume with more --data.num-workers (now {run.options.data.num_workers}), or see: dino bench"
        yield Finding("note", text, advice)
    elif running and rate < usual / 2:
        yield Finding("note", f"{text}; before it was {usual:,.0f}", "Another program may use the machine: dino doctor")
    else:
        yield Finding("good", text)
