"""The curves of a run as inline SVG. Their colors are the page's CSS variables, so they follow light and dark mode."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dino.options import required
from dino.report.run import Run

MOST_POINTS = 300  # longer curves are averaged over equal runs of steps, with their range behind the line

# Matplotlib draws in stand-in colors that nothing else has; the page's CSS variables take their place.
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
    """One pair of axes. `series`: label to metric; the label is shown with the last value in `form`."""

    series: dict[str, str]
    form: str = "{:.2f}"
    marks: dict[str, float] = field(default_factory=dict)  # label: height of a dashed line
    stacked: bool = False
    log: bool = False
    change: Callable[[np.ndarray], np.ndarray] = np.asarray  # of the values, before anything else


@dataclass(frozen=True)
class Chart:
    title: str
    caption: str
    panels: list[Panel]
    columns: int = 1


def charts(run: Run) -> list[Chart]:
    """Every chart that the run has numbers for."""
    knn = run.knn or "knn20_top1"
    k_near, pixels = knn[3:5], run.points(f"pixels_{knn}")[1]
    k, ln_k = run.options.head.out_dim, {f"ln K = {run.limit:.2f}": run.limit}
    drawn = [
        Chart(
            "Loss",
            "The loss is the entropy of the teacher's targets plus the KL divergence of the student from them, in nats. "
            "That it rises early is normal: targets start out vague and alike and become more telling. Entropy that "
            f"stays at ln K (here {run.limit:.2f}) means too little sharpening or too many prototypes; entropy and KL "
            "both near 0 mean collapse to one prototype.",
            [Panel({"entropy": "teacher_entropy", "KL": "kl"}, stacked=True, marks=ln_k)],
        ),
        Chart(
            "Loss on vectors",
            "Between projections of two views, and how far the teacher's projections of different images lie apart: 1 when "
            "they are all over the sphere, near 0 when all images are the same point, which is collapse.",
            [Panel({"loss": "loss"}), Panel({"target spread": "target_spread"})]
            if run.points("target_spread")[0]
            else [],
        ),
        Chart(
            "k-NN accuracy",
            "Held-out images classified by the vote of their nearest training images, in percent. Labels are used here "
            "only. Healthy: it leaves the accuracy of raw pixels behind and keeps rising; small dips are noise.",
            [Panel({f"{k_near} neighbors": knn}, "{:.1f} %", {f"raw pixels {p:.1f} %": p for p in pixels[:1]})],
        ),
        Chart(
            "Attention on objects",
            "Jaccard overlap of the 60 %-mass attention masks with the drawn objects, in percent. Healthy: the best head "
            "rises above its untrained start. The mean over heads may stay low, for heads share the work.",
            [Panel({"best head": "jaccard_best_head", "mean over heads": "jaccard_mean_head"}, "{:.1f} %")],
        ),
        Chart(
            "Feature health",
            "Needs no labels. Effective rank: how many directions the features use. Feature spread: 1 when their "
            "directions are even, 0 when all features are the same. Both falling towards their minimum is collapse.",
            [Panel({"effective rank": "effective_rank"}, "{:.1f}"), Panel({"feature spread": "feature_std"})],
        ),
        Chart(
            "Prototype usage",
            f"How many of the K = {k} prototypes the mean target of a batch spreads over (exp of its entropy). Healthy: "
            "many, or a number that recovers after the start. It cannot exceed by much what one batch can fill; near 1 "
            "means one prototype has won.",
            [Panel({"prototypes in use": "prototype_usage"}, "{:.0f}", change=np.exp)],
        ),
        Chart(
            "Center and gradients",
            "The norm of the center grows at first and settles. The gradient norm is taken before clipping: "
            "single spikes are harmless, steady growth calls for a lower learning rate.",
            [Panel({"center norm": "center_norm"}), Panel({"gradient norm": "grad_norm"}, log=True)],
        ),
        Chart(
            "Schedules",
            "What was set, not measured: learning rate (warm-up, then cosine), weight decay, momentum of the teacher "
            "(rises to 1, so that it ends up standing still) and temperature of its softmax.",
            [
                Panel({"learning rate": "lr"}, "{:.1e}"),
                Panel({"weight decay": "weight_decay"}, "{:.2g}"),
                Panel({"momentum": "momentum"}, "{:.4g}"),
                Panel({"temperature": "teacher_temp"}, "{:.2g}"),
            ],
            columns=2,
        ),
        Chart(
            "Speed",
            "Images per second of training, and the share of time it waited for data. A share above some 10 % says that "
            "reading and rendering is the bottleneck: more --data.num-workers may help.",
            [
                Panel({"images/s": "images_per_second"}, "{:,.0f}"),
                Panel({"waiting for data": "data_wait_share"}, "{:.1f} %", change=lambda x: 100 * x),
            ],
        ),
    ]
    kept = [replace(c, panels=[p for p in c.panels if any(run.points(n)[0] for n in p.series.values())]) for c in drawn]
    return [chart for chart in kept if chart.panels]


def draw(chart: Chart, run: Run) -> str:
    """The chart as an <svg> element that scales with its box."""
    style: Any = _STYLE | {"svg.hashsalt": chart.title}  # fixed ids, different from chart to chart
    with matplotlib.rc_context(style):
        rows = math.ceil(len(chart.panels) / chart.columns)
        figure = Figure(figsize=(4.2, 2.75), layout="constrained")
        axes = figure.subplots(rows, chart.columns, sharex=True, squeeze=False).flatten()
        unit, scale = _time(run)
        for axis, panel in zip(axes, chart.panels, strict=False):
            _panel(axis, panel, run, scale, compact=rows > 1)
        for axis in axes[-chart.columns :]:
            axis.set_xlabel(unit)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", file.getvalue(), flags=re.DOTALL)
    svg = svg[svg.index("<svg") :]
    # Only the first tag's size goes; the view box that stays lets the page choose one.
    svg = re.sub(
        r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg role="img" aria-label="{escape(chart.title)}" \1>', svg
    )
    for color, name in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg


def _time(run: Run) -> tuple[str, float]:
    """What the horizontal axis counts, and how many of it a step is."""
    per_epoch = run.total / required(run.options.epochs)
    return ("epoch", 1 / per_epoch) if run.steps >= 2 * per_epoch else ("step", 1.0)


def _panel(axis: Axes, panel: Panel, run: Run, scale: float, compact: bool) -> None:
    base: np.ndarray | None = None
    for color, (label, metric) in zip(_SERIES, panel.series.items(), strict=False):
        steps, values = run.points(metric)
        if not steps:
            continue
        x, y = np.array(steps) * scale, panel.change(np.array(values, dtype=float))
        label = f"{label} {panel.form.format(y[-1])}"
        y[~np.isfinite(y)] = np.nan
        if panel.stacked:
            x, y = _coarser(x)[0], _coarser(y)[0]
            below = np.zeros_like(y) if base is None else base
            axis.fill_between(x, below, below + y, color=color, alpha=0.28, linewidth=0)
            base = y = below + y
        else:
            (x, _, _), (y, low, high) = _coarser(x), _coarser(y)
            if len(y) < len(values):
                axis.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        marker = "o" if len(x) < 25 else None
        axis.plot(x, y, color=color, label=label, marker=marker, markersize=3.5, clip_on=False)
    for label, height in panel.marks.items():
        axis.axhline(height, color=_SOFT, linewidth=1, linestyle=(0, (4, 3)), label=label)
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
    axis.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=4, handlelength=1, columnspacing=1, borderpad=0)


def _coarser(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, smallest and largest of at most MOST_POINTS runs of equal length."""
    parts = np.array_split(values, min(len(values), MOST_POINTS))
    return tuple(np.array([f(part) for part in parts]) for f in (np.mean, np.min, np.max))  # pyright: ignore
