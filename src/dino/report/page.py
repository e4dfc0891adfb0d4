"""The report of a run: one HTML file that needs nothing else, for whoever trained it and for whoever asks what it is."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup

from dino import weights
from dino.data.sources import Source
from dino.engine.log import EVALUATIONS, read_evaluations
from dino.engine.trackers import read_pages
from dino.html import render, write_page
from dino.machine import name_device, name_processor
from dino.models import Backbone
from dino.options import required
from dino.report.curves import draw_chart, list_charts
from dino.report.gallery import Gallery
from dino.report.run import Run
from dino.report.verdict import Verdict, judge
from dino.weights.runs import Best


def write_report(folder: Path, source: Source, held_out: Source | None, device: torch.device) -> Path:
    """Write `report.html` for the run in `folder`, complete or not, and return its path.

    Args:
        source: the images the run trains on.
        held_out: images set aside; None shows training images instead.

    Raises:
        ValueError: there is no run or no saved weights in `folder`.
    """
    run = Run.read(folder, len(source))
    verdict = judge(run)
    found = weights.read(folder, only_backbone=True)
    model = weights.build_backbone(found).to(device)
    shown = source if held_out is None else held_out
    sections = {
        "Result": render_result(run, model, source, shown, verdict, found.best),
        **({"What was measured": render("measured", lines=measured)} if (measured := list_measured(folder)) else {}),
        **Gallery.open(run, model, source, held_out, device).render_sections(),
        "Training": render(
            "training", run=run, charts=[(c, *draw_chart(c, run)) for c in list_charts(run)], pages=read_pages(folder)
        ),
        "Options and environment": render(
            "details",
            environment=describe_environment(device),
            config=(folder / "config.toml").read_text(encoding="utf-8"),
        ),
    }
    path = folder / "report.html"
    top = render("verdict", verdict=verdict) + render("facts", facts=list_facts(run, model, source))
    write_page(path, folder.resolve().name, "DINO pre-training", top, sections)
    return path


def list_facts(run: Run, model: Backbone, source: Source) -> dict[str, str]:
    """What was trained on what, for how long."""
    o, count = run.options, sum(p.numel() for p in model.parameters())
    state = "complete" if run.complete else "stopped"
    epochs = run.steps * required(o.epochs) / run.total
    patch = "" if o.model.patch_size is None else f"/{o.model.patch_size}"  # timm's names contain it
    classes = f"{len(source.classes)} classes" if source.classes else "no labels"
    speed = None if run.rate is None else f"{format_duration(run.seconds)}, {run.rate:,.0f} images/s"
    return {
        "Run": f"{state}: {epochs:.3g} of {o.epochs} epochs, {run.steps:,} steps of {required(o.batch_size):,} images",
        "Data": f"{o.data.path.replace(chr(10), ', ')}: {len(source):,} images, {classes}",
        "Model": f"{o.model.arch}{patch} at {model.image_size} pixels, {count / 1e6:.1f} M parameters",
        "Time": speed or "not measured",
    }


def render_result(
    run: Run, model: Backbone, source: Source, shown: Source, verdict: Verdict, best: Best | None
) -> Markup:
    """The figures of merit, and what a reader must not miss. `shown`: the images that were evaluated."""
    names = {"knn": run.knn, "overlap": "jaccard_best_head", "mean_map": "jaccard_mean_map"}
    names |= {"rank": "effective_rank", "spread": "feature_std"}
    values = {key: run.compare(name) for key, name in names.items() if name and run.get_metric(name)[0]}
    facts = {"run": run, "model": model, "source": source, "shown": shown, "verdict": verdict}
    return render("result", **facts, values=values, taken=best and best.describe(run.steps))


def list_measured(folder: Path) -> list[dict[str, Any]]:
    """The newest line of each evaluation with the same options and weights, in the order of their first."""
    newest: dict[str, dict[str, Any]] = {}
    for line in read_evaluations(folder / EVALUATIONS):
        newest[json.dumps([line[name] for name in ("evaluation", "options", "step", "teacher")])] = line
    return [*newest.values()]


def describe_environment(device: torch.device) -> dict[str, str]:
    try:
        own = version("dino-vision")
    except PackageNotFoundError:  # run from a checkout
        own = "not installed"
    values = {
        "dino": own,
        "commit": find_commit(),
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "device": name_device(device) if device.type != "cpu" else f"{torch.get_num_threads()} threads",
        "processor": f"{name_processor()}, {os.cpu_count()} cores",
        "system": platform.platform(),
    }
    return {name: value for name, value in values.items() if value}


def find_commit() -> str:
    """The commit of the checkout that this package runs from; empty where git does not know this very file."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        for arguments in (["ls-files", "--error-unmatch", Path(__file__).name], ["describe", "--always", "--dirty"]):
            done = subprocess.run(git + arguments, capture_output=True, text=True, timeout=5)
            if done.returncode:
                return ""
        return done.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def format_duration(seconds: float) -> str:
    """For people: "48 s", "4 min 12 s", "3 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole // 60 % 60:02d} min"
