"""The report of a run: one HTML file that needs nothing else, for whoever trained it and for whoever asks what it is."""

from __future__ import annotations

import os
import platform
import subprocess
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dino import files, weights
from dino.data.sources import Source
from dino.html import render_page
from dino.models import Backbone
from dino.options import required
from dino.report import curves
from dino.report.gallery import Gallery
from dino.report.run import Run


def write(folder: Path, source: Source, held_out: Source | None, device: torch.device) -> Path:
    """Write `report.html` for the run in `folder`, complete or not, and return its path.

    Args:
        source: the images the run trains on.
        held_out: images set aside; None shows training images instead.

    Raises:
        ValueError: there is no run or no saved weights in `folder`.
    """
    run = Run.read(folder, len(source))
    model = weights.load(folder).to(device)
    gallery = Gallery.open(run, model, source, held_out, device)
    sections = {"Result": result(run, model, source, held_out)} | gallery.sections()
    sections |= {"Training": training(run), "Options and environment": details(run, device)}
    sections = {title: body for title, body in sections.items() if body}
    path = folder / "report.html"
    with files.replacing(path) as temporary:  # file names need not be valid Unicode; a page must be
        temporary.write_text(page(run, model, source, sections), encoding="utf-8", errors="replace")
    return path


def page(run: Run, model: Backbone, source: Source, sections: dict[str, str]) -> str:
    return render_page(run.folder.resolve().name, "DINO pre-training", facts(run, model, source), sections)


def facts(run: Run, model: Backbone, source: Source) -> str:
    """What was trained on what, for how long."""
    o, count = run.options, sum(p.numel() for p in model.parameters())
    state = "complete" if run.complete else "stopped"
    epochs = run.steps * required(o.epochs) / run.total
    patch = "" if o.model.patch_size is None else f"/{o.model.patch_size}"  # timm's names say it themselves
    classes = f", {len(source.classes)} classes" if source.classes else ", no labels"
    rows = {
        "Run": f"{state}: {epochs:.3g} of {o.epochs} epochs, {run.steps:,} steps of {required(o.batch_size):,} images",
        "Data": f"{escape(o.data.path).replace('/', '/<wbr>')}: {len(source):,} images{classes}",
        "Model": f"{escape(required(o.model.arch))}{patch} at {model.image_size} pixels, {count / 1e6:.1f} M parameters",
        "Time": f"{duration(run.seconds)}, {run.rate:,.0f} images/s" if run.rate is not None else "not measured",
    }
    return "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in rows.items()) + "</dl>"


# --- result --------------------------------------------------------------------------------------------------------


def result(run: Run, model: Backbone, source: Source, held_out: Source | None) -> str:
    """The figures of merit, and what a reader must not miss."""
    cards = [knn_card(run, source), overlap_card(run)]
    unlabeled = ""
    if not any(cards):
        cards = health_cards(run, model) or ["<p>Nothing has been measured yet.</p>"]
        unlabeled = " Without labels there is no accuracy to give; the pictures below tell more."
    where = "held-out" if held_out is not None else "training (none are held out)"
    count = len(source if held_out is None else held_out)
    note = (
        f'<p class="small">Measured on {min(count, 1000):,} {where} images with the teacher\'s backbone.{unlabeled}</p>'
    )
    return f'{notices(run)}<div class="cards">{"".join(cards)}</div>{note}'


def knn_card(run: Run, source: Source) -> str:
    if run.knn is None:
        return ""
    before, after = run.before_after(run.knn)
    pixels = next(iter(run.points(f"pixels_{run.knn}")[1]), None)
    text = (
        f"of held-out images get the right class, of {len(source.classes)}, by the vote of their {run.knn[3:5]} nearest "
        "training images (k-NN top-1)."
    )
    if after is not None and pixels is not None:
        text += (
            " The features tell more than raw pixels do."
            if after > pixels
            else " Raw pixels do as well: the features know little yet that colors do not tell."
        )
    return card("k-NN accuracy", text, {"untrained": before, "raw pixels": pixels}, after)


def overlap_card(run: Run) -> str:
    before, after = run.before_after("jaccard_best_head")
    text = (
        "overlap (Jaccard) of the best head's attention mask with the drawn objects, seen at twice the training size. "
        "Masks were never trained on."
    )
    return "" if before is None and after is None else card("Attention on objects", text, {"untrained": before}, after)


def card(title: str, text: str, before: dict[str, float | None], after: float | None) -> str:
    """A large percentage over bars that compare it with what came before; without it, the bars say where it starts."""
    bars = before | {"trained": after}
    rows = "".join(
        f'<div class="bar {"now" if name == "trained" else ""}"><span>{name}</span>'
        f'<i><b style="width:{max(0.0, min(100.0, value)):.1f}%"></b></i><span>{value:.1f} %</span></div>'
        for name, value in bars.items()
        if value is not None
    )
    figure = f"{after:.1f}<small> %</small>" if after is not None else "&ndash;"
    unmeasured = "" if after is not None else " Not measured since training began."
    return (
        f'<article class="card"><h3>{title}</h3><p class="figure">{figure}</p><p>{text}{unmeasured}</p>'
        f'<div class="bars">{rows}</div></article>'
    )


def health_cards(run: Run, model: Backbone) -> list[str]:
    """What can be said without labels."""
    told = {
        "Effective rank": (
            "effective_rank",
            "{:.1f}",
            f"directions in use, of {model.embed_dim}. More is richer; a value that falls towards 1 while training is "
            "collapse.",
        ),
        "Feature spread": (
            "feature_std",
            "{:.2f}",
            "between 0, where all features are the same (collapse), and 1, where they point evenly in all directions.",
        ),
    }
    cards = []
    for title, (name, form, text) in told.items():
        before, after = run.before_after(name)
        if before is None and after is None:
            continue
        figure = form.format(before if after is None else after)
        came = f"Untrained: {form.format(before)}." if before is not None and after is not None else ""
        came = "Not measured since training began." if after is None else came
        cards.append(
            f'<article class="card"><h3>{title}</h3><p class="figure">{figure}</p><p>{text}</p>'
            f'<p class="small">{came}</p></article>'
        )
    return cards


def notices(run: Run) -> str:
    """Unfinished, collapsed, unreadable."""
    texts = []
    if not run.complete:
        resume = f"<code>dino train --resume {escape(str(run.folder))}</code>"
        texts.append(f"This run stopped at step {run.steps:,} of {run.total:,}. Continue it with: {resume}")
    texts += [f"Step {step:,}: {escape(text)}" for step, text in run.warnings()]
    if run.quarantine:
        some = "".join(
            f"<li><code>{escape(str(line.get('image')))}</code>: {escape(str(line.get('reason')))}</li>"
            for line in run.quarantine[:5]
        )
        more = f"<li>and {len(run.quarantine) - 5} more</li>" if len(run.quarantine) > 5 else ""
        count = len(run.quarantine)
        texts.append(
            f"{count} image{'s' if count > 1 else ''} could not be read; others took their place "
            f"(all in quarantine.jsonl):<ul>{some}{more}</ul>"
        )
    return "".join(f'<div class="notice">{text}</div>' for text in texts)


# --- the rest ------------------------------------------------------------------------------------------------------


def training(run: Run) -> str:
    figures = "".join(
        f'<article class="chart"><h3>{escape(chart.title)}</h3>{curves.draw(chart, run)}<p>{escape(chart.caption)}</p>'
        "</article>"
        for chart in curves.charts(run)
    )
    return f'<div class="charts">{figures}</div>' if figures else "<p>No step has been logged yet.</p>"


def details(run: Run, device: torch.device) -> str:
    rows = "".join(f"<tr><th>{k}</th><td>{escape(v)}</td></tr>" for k, v in environment(device).items())
    text = escape((run.folder / "config.toml").read_text(encoding="utf-8"))
    return (
        f"<details><summary>Where this report was written</summary><table>{rows}</table></details>"
        f"<details><summary>All options (config.toml; <code>dino train config.toml --out ...</code> repeats the run)"
        f"</summary><pre>{text}</pre></details>"
    )


def environment(device: torch.device) -> dict[str, str]:
    try:
        own = version("dino")
    except PackageNotFoundError:  # run from a checkout
        own = "not installed"
    values = {
        "dino": own,
        "commit": commit(),
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads",
        "processor": processor(),
        "system": platform.platform(),
    }
    return {name: value for name, value in values.items() if value}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {os.cpu_count()} cores" if names else platform.processor()


def commit() -> str:
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


def duration(seconds: float) -> str:
    """For people: "48 s", "4 min 12 s", "3 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole // 60 % 60:02d} min"
