"""Tables and curves of `learning.py`: mean and spread over seeds, the difference from the base, and the floors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Columns by the names of figures; a set has those that were measured. The first of a set is compared with the base.
COLUMNS = {
    "knn20_top1": "20-NN",
    "knn10_top1": "10-NN",
    "knn10_class_mean": "10-NN by class",
    "linear_top1": "linear",
    "linear_class_mean": "linear by class",
    "jaccard_best_head": "Jaccard best head",
    "jaccard_mean_head": "Jaccard mean head",
    "minutes": "minutes",
}
DASHES = (":", "-.", (0, (6, 2)), (0, (1, 3)))  # of the floors

# set -> setting -> what was found with each seed: {"trained": figures, "untrained": figures, "curve": ..., "collapse": ...}
Results = dict[str, dict[str, list[dict[str, Any]]]]
Floors = dict[str, dict[str, float]]


def format_mean(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds; "" without values."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def compare(values: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Difference of the means and its standard error; infinite with less than two seeds on either side."""
    if min(len(values), len(base)) < 2:
        return statistics.fmean(values) - statistics.fmean(base), math.inf
    error = math.sqrt(sum(statistics.variance(part) / len(part) for part in (values, base)))
    return statistics.fmean(values) - statistics.fmean(base), error


def format_difference(values: Sequence[float], base: Sequence[float]) -> str:
    """The difference from the base, its standard error, and whether it is more than two of them."""
    if not values or not base:
        return ""
    difference, error = compare(values, base)
    if math.isinf(error):
        return f"{difference:+.1f}"
    verdict = "not clear" if abs(difference) <= 2 * error else "better" if difference > 0 else "worse"
    return f"{difference:+.1f} (SE {error:.1f}): {verdict}"


def format_set(name: str, found: dict[str, list[dict[str, Any]]], floors: Floors) -> str:
    """The Markdown table of one set: settings, their untrained networks and the floors; "auto" (or the first) is the base."""

    def gather(setting: str, state: str, key: str) -> list[float]:
        return [run[state][key] for run in found[setting] if key in run[state]]

    figures = [run[state] for runs in found.values() for run in runs for state in ("trained", "untrained")]
    columns = [key for key in COLUMNS if any(key in one for one in (*figures, *floors.values()))]
    base, first = "auto" if "auto" in found else next(iter(found)), columns[0] if columns else ""
    against = f"{COLUMNS.get(first, '')} against {base}"
    rows = [
        [name, "seeds", *(COLUMNS[key] for key in columns), against],
        ["---", *["---:"] * (len(columns) + 1), "---"],
    ]
    for setting, runs in found.items():
        collapsed = sum(run["collapse"] for run in runs)
        title = f"{setting} ({collapsed} collapsed)" if collapsed else setting
        values = {key: gather(setting, "trained", key) for key in columns}
        difference = "" if setting == base else format_difference(values.get(first, []), gather(base, "trained", first))
        rows.append([title, f"{len(runs)}", *map(format_mean, values.values()), difference])
    for setting, runs in found.items():
        values = [format_mean(gather(setting, "untrained", key)) for key in columns]
        rows += [[f"untrained {setting}", f"{len(runs)}", *values, ""]] if any(values) else []
    for floor, one in floors.items():
        rows.append([floor, "", *(format_mean([one[key]] if key in one else []) for key in columns), ""])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def trace_curve(lines: list[dict[str, Any]], batch: int) -> dict[str, list[float]]:
    """Minutes that the steps took up to each check, and the 20-NN there; [] of it without labels. Checks take no time."""
    minutes, before, curve = 0.0, 0, {"minutes": [0.0], "knn20_top1": []}
    for line in lines:
        if speed := line.get("images_per_second"):
            minutes += (line["step"] - before) * batch / speed / 60
            before = line["step"]
        if "effective_rank" in line and line["step"] > 0:
            curve["minutes"].append(minutes)
        if "knn20_top1" in line:
            curve["knn20_top1"].append(line["knn20_top1"])
    return curve


def draw_curves(results: Results, floors: dict[str, Floors], path: Path) -> None:
    """20-NN of the checks against minutes of training, a panel to each set that has any; the band is the spread."""
    shown = [
        name for name, found in results.items() if any(run["curve"]["knn20_top1"] for r in found.values() for run in r)
    ]
    if not shown:
        return
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        columns = min(3, len(shown))
        rows = -(-len(shown) // columns)
        figure = Figure(figsize=(1 + 4.2 * columns, 1 + 3.2 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, name in zip(axes, shown, strict=False):
            draw_set(axis, results[name], floors[name])
            axis.set_title(name, loc="left")
            axis.set(xlabel="minutes of training", ylabel="20-NN of the checks, %")
        for axis in axes[len(shown) :]:
            axis.set_axis_off()
        lines = {line.get_label(): line for axis in axes for line in axis.get_lines()}
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, dpi=150)


def draw_set(axis: Axes, found: dict[str, list[dict[str, Any]]], floors: Floors) -> None:
    for number, (setting, runs) in enumerate(found.items()):
        curves = [(run["curve"]["minutes"], run["curve"]["knn20_top1"]) for run in runs if run["curve"]["knn20_top1"]]
        if not curves:
            continue
        grid = np.linspace(0, min(minutes[-1] for minutes, _ in curves), 200)
        values = np.stack([np.interp(grid, *curve) for curve in curves])
        axis.plot(grid, values.mean(0), color=f"C{number}", label=setting)
        if len(curves) > 1:
            spread = values.std(0, ddof=1)
            axis.fill_between(
                grid, values.mean(0) - spread, values.mean(0) + spread, color=f"C{number}", alpha=0.15, lw=0
            )
        axis.axhline(
            values[:, 0].mean(), color=f"C{number}", lw=0.8, ls="--", label="untrained, in the color of the setting"
        )
    plain = {name: one for name, one in floors.items() if "knn20_top1" in one and "plain votes" not in name}
    for dashes, (name, one) in zip(DASHES, plain.items(), strict=False):
        axis.axhline(one["knn20_top1"], color="black", lw=1, ls=dashes, label=name)
