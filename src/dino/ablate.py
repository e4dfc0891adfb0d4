"""`dino ablate`: train every row of one of the paper's tables, and print its k-NN accuracy beside the paper's figures.

Each row is a run in a folder and process of its own. The same command again skips the rows that are finished and
resumes the one that was interrupted.
"""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import matplotlib
import tomli_w
import torch
from matplotlib.figure import Figure

from dino import distributed, files, paper, weights
from dino.data.open import open_labeled_pair
from dino.data.specs import make_absolute, split_folders
from dino.engine.checkpoint import LOCK, lock_folder
from dino.engine.log import read_metrics
from dino.eval import knn
from dino.machine import check_cores, count_spare_cores
from dino.options import flatten, replace, required, toml
from dino.options.commands import AblateOptions
from dino.options.evaluate import KnnOptions
from dino.options.recipes import choose_base
from dino.options.resume import FREE_ON_RESUME
from dino.options.train import TrainOptions
from dino.paper import Row, Table
from dino.terminal import Terminal

K = 20
OURS, THEIRS, UNTRAINED = "#2a6f97", "#a9b4c2", "#c1121f"  # colors of the figure


class Ablation:
    """One table, at one scale, on one data set, in one folder."""

    def __init__(self, options: AblateOptions):
        check_cores("jobs", options.jobs, 4)
        self.options, self.table = options, paper.find_table(options.table)
        self.folder = Path(options.out or f"runs/ablate-{options.table}")
        self.data = split_folders(make_absolute(required(options.data)), options.val and make_absolute(options.val))
        self.results_file = self.folder / "results.json"
        self.terminal = Terminal(keep=False)
        self.runs = {row.name: self._row_options(row) for row in self.table.rows}
        self.running: list[subprocess.Popen[bytes]] = []
        self.stopping = False
        self.device = distributed.start(options.device)

    def _row_options(self, row: Row) -> TrainOptions:
        o, table, tiny = self.options, self.table, self.options.scale == "tiny"
        base = choose_base(o.recipe or (paper.TINY_RECIPE if tiny else table.recipe))
        changes = {"epochs": paper.TINY_EPOCHS} if tiny and o.recipe is None else {}
        changes |= {**({} if tiny else table.paper_base), **table.base}
        changes |= row.tiny if tiny else row.changes
        changes |= {"data.path": self.data[0], "data.val": self.data[1], "minutes": None, "hours": None}
        return replace(base, changes if o.epochs is None else changes | {"epochs": o.epochs})

    def run_rows(self) -> dict[str, dict[str, Any]]:
        """Train and evaluate the rows that are missing: one after the other, or one to each GPU or job.

        Raises:
            ValueError: the folder holds another table, rows of other options, or no ablation at all.
        """
        open_labeled_pair(*self.data)  # refuses data that every row would fail with
        there = {child.name for child in self.folder.iterdir()} if self.folder.is_dir() else set()
        if there - {LOCK} and "rows" not in there:
            raise ValueError(f"{self.folder} is not empty and holds no ablation; choose another --out.")
        with lock_folder(self.folder):
            results = json.loads(self.results_file.read_text()) if self.results_file.is_file() else {}
            for name in results | self.runs:
                if not self._is_as_wanted(name, results.get(name)):
                    raise ValueError(f"{self.folder} holds '{name}' with other options or data; choose another --out.")
            (self.folder / "rows").mkdir(exist_ok=True)
            done, total = len(results), len(self.runs)
            self.terminal.say(f"{self.table.title}: {total} rows, {done} finished; in {self.folder}")
            self._run_missing(results)
        return {name: results[name] for name in self.runs if name in results}

    def _is_as_wanted(self, name: str, result: dict[str, Any] | None) -> bool:
        """Whether row `name`, if it is finished (with `result`) or begun, has the options that are wanted now."""
        wanted, run = _flatten(self.runs[name]) if name in self.runs else None, self.folder / make_slug(name)
        if result is not None or wanted is None:
            return result is not None and result["options"] == wanted
        if not (run / "config.toml").exists():
            return True
        return wanted.items() <= _flatten(toml.read_recorded(str(run))).items()

    def _run_missing(self, results: dict[str, dict[str, Any]]) -> None:
        places = self._find_places()
        free: SimpleQueue[str] = SimpleQueue()
        for place in places:
            free.put(place)

        def run_row(name: str) -> tuple[str, dict[str, Any] | None]:
            place = free.get()
            try:
                return name, None if self.stopping else self._run_row(name, place)
            finally:
                free.put(place)

        pool = ThreadPoolExecutor(len(places))
        self.terminal.update(len(results), "training; each row's output is in its .log file")
        self.terminal.start(len(results), len(self.runs))
        try:
            for finished in as_completed([pool.submit(run_row, name) for name in self.runs if name not in results]):
                name, result = finished.result()
                if result is not None:
                    results[name] = result
                    with files.replacing(self.results_file) as temporary:
                        temporary.write_text(json.dumps(results, indent=1))
                    warning = ", collapsed" if result["collapse"] else ""
                    self.terminal.say(
                        f"  {name}: k-NN {result['knn']:.1f} %{warning} ({result['minutes']:.0f} minutes)"
                    )
                    self.terminal.update(len(results), "training; each row's output is in its .log file")
        finally:
            self.stopping = True
            for process in self.running.copy():
                process.terminate()  # the row saves itself; the same command resumes it
            pool.shutdown()
            self.terminal.stop()

    def _find_places(self) -> list[str]:
        """Where rows are trained at the same time: the GPUs that this process may use, or CPU jobs."""
        gpus = torch.cuda.device_count() if self.options.device != "cpu" else 0
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = [name.strip() for name in given.split(",")] if given else range(gpus)
        return [f"cuda:{name}" for name in names][:gpus] if gpus else ["cpu"] * self.options.jobs

    def _run_row(self, name: str, place: str) -> dict[str, Any] | None:
        """Train row `name` to its end and evaluate it; None when it did not get there."""
        options, run, file = (
            self.runs[name],
            self.folder / make_slug(name),
            self.folder / "rows" / f"{make_slug(name)}.toml",
        )
        file.write_text(tomli_w.dumps(toml.to_dict(options)))
        flags = ["--resume", str(run)] if (run / "config.toml").exists() else [str(file), "--out", str(run)]
        flags += [] if self.options.report else ["--no-report"]
        environment = dict(os.environ)
        if place.startswith("cuda"):
            environment["CUDA_VISIBLE_DEVICES"] = place.removeprefix("cuda:")
            if options.data.num_workers is None:
                flags += ["--data.num-workers", str(count_spare_cores(len(self._find_places())))]
        else:
            flags += ["--device", "cpu", "--threads", str(options.threads or count_spare_cores(self.options.jobs))]
        command, before = [sys.executable, "-m", "dino", "train", *flags], time.monotonic()
        with open(file.with_suffix(".log"), "ab") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            self.running.append(process)
            code = process.wait()
            self.running.remove(process)
        if code != 0:
            last = file.with_suffix(".log").read_text(errors="replace").strip().splitlines()[-1:]
            self.terminal.say(f"  {name}: failed ({'; '.join(last)}); run the same command again to go on")
            return None
        lines = read_metrics(run / "metrics.jsonl")
        epochs = required(toml.read_recorded(str(run)).epochs)
        if max((line["epoch"] for line in lines if "loss" in line), default=0) < epochs:
            return None  # it was asked to stop
        (train, val), figure = self.data, f"knn{K}_top1"
        model = weights.load(f"{run}:last").to(self.device)  # as the paper, which chooses none by its test images
        found = knn.evaluate(model, KnnOptions(model=str(run), data=train, val=val, k=(K,)), self.device)
        return {
            "options": _flatten(options),
            "knn": found.figures[figure],
            "untrained": next((line[figure] for line in lines if figure in line), None),
            "collapse": any(line.get("collapse") for line in lines),
            "minutes": (time.monotonic() - before) / 60,
        }


def make_slug(name: str) -> str:
    """A row's name as the name of its files."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def _flatten(options: TrainOptions) -> dict[str, Any]:
    """Options that are set, as JSON gives them back, without those that may differ from machine to machine."""
    flat = {k: v for k, v in flatten(options).items() if k not in FREE_ON_RESUME and v is not None}
    return json.loads(json.dumps(flat))


def _format(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def format_rows(table: Table, results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Header and rows of text: name, ours, collapse, the paper's k-NN and linear figures."""
    rows = [["row", f"k-NN (k = {K})", "collapse reported", "paper: k-NN", "paper: linear", "minutes"]]
    for row in table.rows:
        found = results.get(row.name, {})
        collapse = ("yes" if found["collapse"] else "no") if found else ""
        figures = found.get("knn"), row.knn, row.linear, found.get("minutes")
        ours, *others = map(_format, figures)
        rows.append([row.name, ours, collapse, *others])
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


def ablate_command(options: AblateOptions) -> int:
    """Run a table and write table.md, table.csv and table.png; without a name, list the tables."""
    if not options.table:
        for name, table in paper.TABLES.items():
            print(f"{name:<12} {table.title}: {'; '.join(row.name for row in table.rows)}")
        return 0
    paper.find_table(options.table)
    if options.data is None:
        raise ValueError("dino ablate needs images with labels for the k-NN; give them with --data.")
    ablation = Ablation(options)
    for asked in (signal.SIGINT, signal.SIGTERM):  # even where a shell's background job ignores them
        signal.signal(asked, signal.default_int_handler)
    results = ablation.run_rows()
    rows, table, note = format_rows(ablation.table, results), ablation.folder / "table", f"{options.scale} scale"
    table.with_suffix(".md").write_text(f"{ablation.table.title}, {note}\n\n{format_markdown(rows)}")
    with open(table.with_suffix(".csv"), "w", newline="") as file:
        csv.writer(file).writerows(rows)
    draw_bars(ablation.table, results, table.with_suffix(".png"), note)
    print(format_markdown(rows), end="")
    print(f"Written: {table}.md, {table}.csv, {table}.png")
    return 0 if len(results) == len(ablation.table.rows) else 1
