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
from urllib.parse import urlsplit

import numpy as np
import psutil
import torch
from huggingface_hub import constants
from packaging.requirements import Requirement
from rich.console import Console
from rich.text import Text

from dino import distributed
from dino.data.open import open_images
from dino.features.survey import survey, write_range
from dino.machine import count_cores
from dino.options import replace
from dino.options.commands import DoctorOptions
from dino.options.train import TrainOptions
from dino.report.examine import GB, Finding, Level, examine_disk, examine_run, find_lost_run
from dino.report.verdict import advise_start
from dino.version import __version__

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
MARKS: dict[Level, tuple[str, str]] = {"good": ("ok", "green"), "note": ("!", "yellow"), "bad": ("X", "bold red")}


def doctor(options: DoctorOptions) -> int:
    """Print what was found; 1 where something is bad.

    Raises:
        ValueError: `options.target` is neither a run nor images.
    """
    distributed.require_single("doctor")
    target, folder = options.target, Path(options.target).expanduser()
    if not target:
        findings = examine_machine()
    elif (folder / "config.toml").is_file():
        findings = examine_run(folder)
    else:
        findings = find_lost_run(folder) or examine_images(target)
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
        text = f"Other programs ask for about {busy:.1f} cores; there are {cores}, so training will be slower"
        yield Finding("note", text)


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
    if absent := {extra: ", ".join(missing) for extra, missing in needed.items() if missing}:
        lines = [f"\n     {extra}, for {EXTRAS[extra]}; without {missing}" for extra, missing in absent.items()]
        text = f"Extras that are not installed; install those that you need:{''.join(lines)}"
        yield Finding("note", text, f"All of them: pip install 'dino-vision[{','.join(absent)}]'")


def is_installed(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        return False


# --- images ----------------------------------------------------------------------------------------------------------


def examine_images(spec: str) -> Iterator[Finding]:
    try:
        source = open_images(spec)
    except ValueError as error:
        if runs := sorted(path.parent for path in Path(spec).expanduser().glob("*/config.toml")):
            advice = f"give one of them: dino doctor {shlex.quote(str(runs[0]))}"
            raise ValueError(f"{spec} holds {len(runs)} {'runs' if runs[1:] else 'run'}; {advice}") from error
        raise
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
