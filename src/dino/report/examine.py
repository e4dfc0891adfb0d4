"""What is wrong with a run, for `dino doctor`: whether it can go on, what it waits for, and whether it learns."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from dino.data.open import open_training_pair
from dino.engine.checkpoint import LOCK, lock_folder
from dino.options import toml
from dino.report.run import Run
from dino.report.verdict import judge
from dino.weights.checkpoints import CheckpointError, get_step, list_checkpoints, list_sharded, read_newest
from dino.weights.runs import BEST, WEIGHTS

GB = 1e9
Level = Literal["good", "note", "bad"]


class Finding(NamedTuple):
    """Something that was looked at.

    Args:
        help: what to do about it, where something is.
    """

    level: Level
    text: str
    help: str = ""


def examine_disk(folder: Path, enough: float, help: str) -> Finding:
    free = shutil.disk_usage(folder).free
    level: Level = "good" if free >= enough else "note" if free >= enough / 5 else "bad"
    return Finding(level, f"{free / GB:.1f} GB are free in {folder}", "" if level == "good" else help)


def find_lost_run(folder: Path) -> list[Finding]:
    """What to say of a `folder` without config.toml, where it is a run all the same."""
    teacher, checkpoints = (folder / WEIGHTS).is_file(), folder / "checkpoints"
    if not (teacher or list_checkpoints(checkpoints) or list_sharded(checkpoints)):
        return []
    advice = "Copy it from a backup, or from a run with the same options"
    advice += f"; its teacher needs none: dino train --init {shlex.quote(str(folder))} --data NEW" if teacher else ""
    return [Finding("bad", f"{folder} is a run that has lost its config.toml", advice)]


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
        yield Finding("bad", f"Its images: {error}", f"If they moved: {write_resume(folder)} --data NEW")
        return
    saved, of_checkpoints = examine_checkpoints(folder)  # before its metrics are read: it may be running
    run = Run.read(folder, images)
    yield examine_progress(run, saved, running)
    yield from of_checkpoints
    yield from examine_files(run, saved)
    yield from examine_rates(run, running)
    for step, text in run.list_warnings():
        yield Finding("bad" if step in run.collapses else "note", f"Step {step:,}: {text}")
    if saved > run.steps:  # a line is written before every checkpoint
        text = (
            f"metrics.jsonl has lost lines: it ends at step {run.steps:,}, and there is a checkpoint of step {saved:,}"
        )
        yield Finding("note", text, "Copy it from a backup; a resume goes on without them, but the curves lack them")
        return
    if len(run.lines) < 2:
        yield Finding("note", "Nothing has been measured yet")
        return
    verdict = judge(run)
    levels: dict[str, Level] = {"better": "good", "not": "bad", "unknown": "note"}
    why = f"{verdict.reason.text} Next: {verdict.reason.command}" if verdict.reason else ""
    yield Finding(levels[verdict.outcome], f"Verdict: {verdict.headline}", why)


def examine_checkpoints(folder: Path) -> tuple[int, list[Finding]]:
    """The step from which the run can be resumed, and what to say of it; 0: it has no checkpoint, -1: none is whole."""
    checkpoints = folder / "checkpoints"
    files, shards = list_checkpoints(checkpoints), list_sharded(checkpoints)
    try:
        newest = read_newest(checkpoints)
    except CheckpointError as error:
        help = "Its last teacher may be whole: dino.load of teacher.safetensors"
        return -1, [Finding("bad", f"Checkpoints: {error}", help)]
    step = newest.state["step"] if newest else get_step(shards[-1]) if shards else 0
    text = f"It can be resumed from step {step:,}" if step else "It has no checkpoint"
    found = [Finding("good" if step else "note", text)]
    if newest and newest.refused:
        text = f"The newest checkpoint, step {get_step(files[-1]):,}, is damaged: {newest.refused[0]}"
        advice = f"Repeat the steps after {step:,}, with the same result: {write_resume(folder)}"
        found.insert(0, Finding("note", text, advice))
    size = max((path.stat().st_size for path in files), default=0)
    found.append(examine_disk(folder, 4 * size, "Free some space: a checkpoint needs it while it is written"))
    return step, found


def examine_progress(run: Run, saved: int, running: bool) -> Finding:
    steps = max(saved, run.steps)
    done = f"step {steps:,} of {run.total:,}"
    if running:
        return Finding("good", f"It is running, at {done}")
    if steps >= run.total:
        return Finding("good", f"It is complete ({done})")
    return Finding("note", f"It stopped at {done}", write_resume(run.folder) if saved >= 0 else "")


def write_resume(folder: Path) -> str:
    return f"dino train --resume {shlex.quote(str(folder))}"


def examine_files(run: Run, saved: int) -> Iterator[Finding]:
    """Its teachers, of which a checkpoint holds copies, and images that could not be read."""
    others = {BEST: f"{run.folder}:last", WEIGHTS: str(run.folder / BEST)}
    whole = [name for name in others if is_readable(run.folder / name)]
    for name, other in others.items():
        if name not in whole and (run.folder / name).exists():
            without = f"Take the other teacher: {other}" if whole else "Copy it from a backup"
            help = f"Write it again: {write_resume(run.folder)}" if saved > 0 else without
            yield Finding("bad", f"{name} is damaged", help)
    if run.quarantine:
        text = f"{len(run.quarantine)} images could not be read; they are listed in quarantine.jsonl"
        yield Finding("note", text, "Repair them, then resume")


def is_readable(file: Path) -> bool:
    """Whether a file of tensors is as long as its header says."""
    try:
        with safe_open(file, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


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
