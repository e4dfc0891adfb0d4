"""The table of an ablation, our figures beside the paper's: as rows of text, as Markdown, and as bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from dino.paper import Table

OURS, THEIRS, UNTRAINED = "#2a6f97", "#a9b4c2", "#c1121f"  # colors of the figure


def _format(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def format_rows(table: Table, results: dict[str, dict[str, Any]], ours: str) -> list[list[str]]:
    """Header and rows of text: name, `ours`, collapse, the paper's k-NN and linear figures."""
    rows = [["row", ours, "collapse reported", "paper: k-NN", "paper: linear", "minutes"]]
    for row in table.rows:
        found = results.get(row.name, {})
        collapse = ("yes" if found["collapse"] else "no") if found else ""
        figures = found.get("knn"), row.knn, row.linear, found.get("minutes")
        accuracy, *others = map(_format, figures)
        rows.append([row.name, accuracy, collapse, *others])
    return rows


def format_markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "| --- |" + " ---: |" * (len(rows[0]) - 1), *lines[1:]]) + "\n"


def draw_bars(table: Table, results: dict[str, dict[str, Any]], path: Path, note: str) -> None:
    """Write a figure with bars of our k-NN beside the paper's, collapsed rows hatched."""
    names = [row.name for row in table.rows][::-1]
    theirs = [row.linear if row.knn is None else row.knn for row in table.rows][::-1]
    which = "k-NN" if any(row.knn is not None for row in table.rows) else "linear"
    ours = [results.get(name, {}) for name in names]
    collapsed = [bool(found.get("collapse")) for found in ours]
    texts = [_format(r.get("knn")) + " collapsed" * c for r, c in zip(ours, collapsed, strict=True)]
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 0.9 + 0.36 * len(names)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        bars = left.barh(names, [r.get("knn", 0) for r in ours], color=OURS, hatch=["///" * c for c in collapsed])
        box = {"color": "white", "pad": 0.5}  # keeps the dashed line out of the text
        left.bar_label(bars, texts, padding=3, bbox=box)
        bars = right.barh(names, [value or 0 for value in theirs], color=THEIRS)
        right.bar_label(bars, [_format(value) for value in theirs], padding=3)
        untrained = [r["untrained"] for r in results.values() if r["untrained"] is not None]
        if untrained:
            left.axvline(untrained[0], color=UNTRAINED, linewidth=1, linestyle="--", label="untrained")
            left.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, -0.06))
        left.set_title(f"here ({note}): k-NN, %")
        right.set_title(f"paper (ImageNet, ViT-S/16): {which}, %")
        for axis in (left, right):
            axis.margins(x=0.18)
        figure.savefig(path, dpi=150)
