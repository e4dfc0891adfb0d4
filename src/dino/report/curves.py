"""The curves of a run as inline SVG. Their colors are CSS variables of the page, so they follow light and dark mode."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dino.options import required
from dino.report.run import Run

MAX_POINTS = 300  # of a curve; a longer one shows averages over equal parts, with their range behind the line

# Matplotlib draws in these colors, which nothing else has. Then the page's CSS variables replace them.
_INK, _SOFT, _LINE = "#0a0b01", "#0a0b02", "#0a0b03"
_SERIES = ("#0a0b11", "#0a0b12", "#0a0b13", "#0a0b14")
_VARIABLES = {_INK: "ink", _SOFT: "soft", _LINE: "line"} | {c: f"c{i}" for i, c in enumerate(_SERIES, 1)}

_STYLE = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    series: dict[str, str]  # a curve's label, shown with its last value, to its metric
    form: str = "{:.2f}"  # of the last value
    marks: dict[str, float] = field(default_factory=dict)  # a dashed line's label to its height
    stacked: bool = False
    log: bool = False  # where values spread over more than a factor of 20
    change: Callable[[np.ndarray], np.ndarray] = np.asarray  # what is drawn, as a function of the metric


@dataclass(frozen=True)
class Chart:
    title: str  # templates/training.html.jinja has its caption
    panels: list[Panel]
    columns: int = 1


def list_charts(run: Run) -> list[Chart]:
    """Every chart that the run has numbers for."""
    knn = run.knn or "knn20_top1"
    floors = {f"{what} {value:.1f} %": value for what, value in run.floors.items()}
    ln_k = {f"ln K = {run.max_entropy:.2f}": run.max_entropy}
    on_vectors = bool(run.get_metric("target_spread")[0])
    heads = {"best head": "jaccard_best_head", "mean map": "jaccard_mean_map", "average": "jaccard_mean_head"}
    schedules = [
        Panel({"learning rate": "lr"}, "{:.1e}"),
        Panel({"weight decay": "weight_decay"}, "{:.2g}"),
        Panel({"momentum": "momentum"}, "{:.4g}"),
        Panel({"temperature": "teacher_temp"}, "{:.2g}"),
    ]
    speed = Panel({"images/s": "images_per_second"}, "{:,.0f}")
    waiting = Panel({"waiting for data": "data_wait_share"}, "{:.1f} %", change=lambda share: 100 * share)
    usage = Panel({"prototypes in use": "prototype_usage"}, "{:.0f}", change=np.exp)
    shares = {"differ": "prototypes_unique", "chosen": "prototypes_chosen"}
    useful = Panel(shares, "{:.1f} %", change=lambda share: 100 * share)
    crops = Panel({"own crop found": "two_crop_retrieval"}, "{:.1f} %")
    rank, spread = Panel({"effective rank": "effective_rank"}, "{:.1f}"), Panel({"feature spread": "feature_std"})
    every = [
        Chart("Loss", [Panel({"entropy": "teacher_entropy", "KL": "kl"}, stacked=True, marks=ln_k)]),
        Chart("Loss on vectors", on_vectors * [Panel({"loss": "loss"}), Panel({"target spread": "target_spread"})]),
        Chart("k-NN accuracy", [Panel({f"{knn[3:5]} neighbors": knn}, "{:.1f} %", floors)]),
        Chart("Attention on objects", [Panel(heads, "{:.1f} %")]),
        Chart("Feature health", [rank, spread]),
        Chart("Knowing an image by its crops", [crops]),
        Chart("Likeness to the start", [Panel({"linear CKA": "cka_start"})]),
        Chart("Prototype usage", [usage, useful]),
        Chart("Center", [Panel({"center norm": "center_norm"})]),
        Chart("Gradients", [Panel({"gradient norm": "grad_norm"}, log=True)]),
        Chart("Schedules", schedules, columns=2),
        Chart("Speed", [speed, waiting]),
    ]
    measured = [
        replace(chart, panels=[p for p in chart.panels if any(run.get_metric(name)[0] for name in p.series.values())])
        for chart in every
    ]
    return [chart for chart in measured if chart.panels]


def draw_chart(chart: Chart, run: Run) -> tuple[str, Markup]:
    """The view box and the content of an <svg> element."""
    style: Any = _STYLE | {"svg.hashsalt": chart.title}  # fixed ids, different from chart to chart
    with matplotlib.rc_context(style):
        rows = math.ceil(len(chart.panels) / chart.columns)
        figure = Figure(figsize=(4.2, 2.75), layout="constrained")
        axes = figure.subplots(rows, chart.columns, sharex=True, squeeze=False).flatten()
        per_epoch = run.total / required(run.options.epochs)
        unit, scale = ("epoch", 1 / per_epoch) if run.steps >= 2 * per_epoch else ("step", 1.0)
        for axis, panel in zip(axes, chart.panels, strict=False):
            _draw_panel(axis, panel, run, scale, compact=rows > 1)
        for axis in axes[-chart.columns :]:
            axis.set_xlabel(unit)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", file.getvalue(), flags=re.DOTALL)
    for color, name in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{name})")
    # The page writes the <svg> tag itself: without a size, the drawing scales with its box.
    found = re.search(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>(.*)</svg>', svg, flags=re.DOTALL)
    assert found is not None
    return found[1], Markup(found[2])


def draw_curves(run: Run) -> list[Markup]:
    """The loss and the k-NN accuracy, each as a drawing of its own; the page says the colors."""
    shown = [chart for chart in list_charts(run) if chart.title.startswith(("Loss", "k-NN"))]
    svg = Markup('<svg viewBox="{}" width="420">{}</svg>')
    return [svg.format(*draw_chart(chart, run)) for chart in shown]


def _draw_panel(axis: Axes, panel: Panel, run: Run, scale: float, compact: bool) -> None:
    base: Any = 0.0  # where curves are stacked, the upper edge of those drawn so far
    for color, (label, metric) in zip(_SERIES, panel.series.items(), strict=False):
        steps, values = run.get_metric(metric)
        if not steps:
            continue
        y = panel.change(np.array(values, dtype=float))
        label = f"{label} {panel.form.format(y[-1])}"
        y[~np.isfinite(y)] = np.nan
        (x, _, _), (y, low, high) = _shorten(np.array(steps) * scale), _shorten(y)
        if panel.stacked:
            low, high, base = base, base + y, base + y
            y = base
        if panel.stacked or len(y) < len(values):
            axis.fill_between(x, low, high, color=color, alpha=0.28 if panel.stacked else 0.2, linewidth=0)
        marker = "o" if len(x) < 25 else None
        axis.plot(x, y, color=color, label=label, marker=marker, markersize=3.5, clip_on=False)
    for (label, height), dash in zip(panel.marks.items(), (4, 1), strict=False):
        axis.axhline(height, color=_SOFT, linewidth=1, linestyle=(0, (dash, 3)), label=label)
    low, high = axis.dataLim.intervaly
    if panel.log and low > 0 and high / low > 20:
        axis.set_yscale("log")
    else:
        axis.yaxis.set_major_locator(MaxNLocator(3 if compact else 5, min_n_ticks=2))
        axis.yaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_major_locator(MaxNLocator(3 if compact else 6, integer=True))
    axis.set_xlim(0, max(1, run.steps) * scale)
    if panel.stacked:
        axis.set_ylim(bottom=0)
    axis.tick_params(length=0)
    columns = 4 if sum(map(len, axis.get_legend_handles_labels()[1])) < 40 else 2
    axis.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=columns, handlelength=1, columnspacing=1, borderpad=0
    )


def _shorten(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, minimum and maximum of at most MAX_POINTS parts of nearly equal length."""
    parts = np.array_split(values, min(len(values), MAX_POINTS))
    mean, low, high = (np.array([f(part) for part in parts]) for f in (np.mean, np.min, np.max))
    return mean, low, high
