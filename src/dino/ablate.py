"""`dino ablate`: train every row of one of the paper's tables and set its k-NN accuracy beside the paper's figures.

Each row is a run of its own below the output folder, started as its own process, so a row that is interrupted
resumes and one that is finished is skipped.
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
from rich.console import Console

from dino import distributed, files, paper, weights
from dino.data.open import make_absolute, split_folders
from dino.engine.checkpoint import LOCK, lock_folder
from dino.engine.log import read_metrics
from dino.eval import knn
from dino.machine import count_spare_cores
from dino.options import flatten, replace, required, toml
from dino.options.commands import AblateOptions
from dino.options.evaluate import KnnOptions
from dino.options.recipes import choose_base
from dino.options.train import TrainOptions
from dino.paper import Row, Table
from dino.run import FREE_ON_RESUME

K = 20


class Ablation:
    """One table, at one scale, on one data set, in one folder."""

    def __init__(self, options: AblateOptions):
        self.options, self.table = options, paper.find_table(options.table)
        self.folder = Path(options.out or f"runs/ablate-{options.table}")
        self.data = split_folders(make_absolute(required(options.data)), options.val and make_absolute(options.val))
        self.results_file = self.folder / "results.json"
        self.console = Console(stderr=True)
        self.runs = {row.name: self._options(row) for row in self.table.rows}
        self.running: list[subprocess.Popen[bytes]] = []
        self.stopping = False
        self.device = distributed.start(options.device)

    def _options(self, row: Row) -> TrainOptions:
        o, table = self.options, self.table
        if o.scale == "tiny":
            base = choose_base(o.recipe or paper.TINY_RECIPE)
            changes = {**table.base, **(row.changes if row.tiny is None else row.tiny)}
            if o.recipe is None:
                changes = {"epochs": paper.TINY_EPOCHS} | changes
        else:
            base, changes = choose_base(o.recipe or table.recipe), {**table.paper_base, **table.base, **row.changes}
        train, val = self.data
        changes |= {"data.path": train, "data.val": val} | ({} if o.epochs is None else {"epochs": o.epochs})
        return replace(base, changes)

    def results(self) -> dict[str, dict[str, Any]]:
        """Finished rows; refuses those of other options.

        Raises:
            ValueError: the folder holds another table or other settings, or no ablation at all.
        """
        if not self.results_file.is_file():
            there = {child.name for child in self.folder.iterdir()} if self.folder.is_dir() else set()
            if there - {LOCK} and "rows" not in there:
                raise ValueError(f"{self.folder} is not empty and holds no ablation; choose another --out.")
            return {}
        found = json.loads(self.results_file.read_text())
        for name, result in found.items():
            if name not in self.runs or result["options"] != _plain(self.runs[name]):
                raise ValueError(f"{self.folder} holds '{name}' with other options or data; choose another --out.")
        return found

    def begun_as_wanted(self, name: str) -> bool:
        """Whether the run of row `name`, if there is one, has the options that are wanted now."""
        run = self.folder / slug(name)
        if not (run / "config.toml").exists():
            return True
        recorded = _plain(toml.read_recorded(str(run)))
        return all(recorded.get(key) == value for key, value in _plain(self.runs[name]).items())

    def work(self) -> dict[str, dict[str, Any]]:
        """Train and judge what is missing, several rows at a time where there are several GPUs or jobs."""
        self.results()  # refuses a folder of something else before anything is written there
        with lock_folder(self.folder):
            return self._work()

    def _work(self) -> dict[str, dict[str, Any]]:
        results = self.results()
        missing = [name for name in self.runs if name not in results]
        if other := [name for name in missing if not self.begun_as_wanted(name)]:
            raise ValueError(f"{self.folder} holds '{other[0]}' with other options or data; choose another --out.")
        (self.folder / "rows").mkdir(parents=True, exist_ok=True)
        self.console.print(
            f"{self.table.title}: {len(self.runs)} rows, {len(results)} finished; in {self.folder}", soft_wrap=True
        )
        slots: SimpleQueue[str] = SimpleQueue()
        places = self._places()
        for place in places:
            slots.put(place)

        def one(name: str) -> tuple[str, dict[str, Any] | None]:
            slot = slots.get()
            try:
                return name, None if self.stopping else self._row(name, slot)
            finally:
                slots.put(slot)

        pool = ThreadPoolExecutor(len(places))
        try:
            with self.console.status("training; each row's output is in its .log file"):
                for finished in as_completed([pool.submit(one, name) for name in missing]):
                    name, result = finished.result()
                    if result is None:
                        continue
                    results[name] = result
                    self._save(results)
                    self.console.print(f"  {name}: {_short(result)}")
        finally:
            self.stopping = True
            for process in self.running.copy():
                process.terminate()  # a row saves itself and resumes next time
            pool.shutdown()
        return {name: results[name] for name in self.runs if name in results}

    def _places(self) -> list[str]:
        gpus = torch.cuda.device_count() if self.options.device != "cpu" else 0
        given = os.environ.get("CUDA_VISIBLE_DEVICES")  # which of the machine's this process may use
        names = [name.strip() for name in given.split(",")] if given else range(gpus)
        return [f"cuda:{name}" for name in names][:gpus] if gpus else ["cpu"] * self.options.jobs

    def _row(self, name: str, place: str) -> dict[str, Any] | None:
        """Train row `name` to its end and measure it; None when it did not get there."""
        run, file = self.folder / slug(name), self.folder / "rows" / f"{slug(name)}.toml"
        file.write_text(tomli_w.dumps(toml.to_dict(self.runs[name])))
        started = (run / "config.toml").exists()
        flags = ["--resume", str(run)] if started else [str(file), "--out", str(run)]
        flags += [] if self.options.report else ["--no-report"]
        environment = dict(os.environ)
        if place.startswith("cuda"):
            environment["CUDA_VISIBLE_DEVICES"] = place.removeprefix("cuda:")
            if self.runs[name].data.num_workers is None:
                flags += ["--data.num-workers", str(count_spare_cores(len(self._places())))]
        else:
            threads = self.runs[name].threads or count_spare_cores(self.options.jobs)
            flags += ["--device", "cpu", "--threads", str(threads)]
        before = time.monotonic()
        with open(file.with_suffix(".log"), "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "dino", "train", *flags], env=environment, stdout=log, stderr=log
            )
            self.running.append(process)
            code = process.wait()
            self.running.remove(process)
        lines = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
        collapsed = any(line.get("collapse") for line in lines)
        if code == 0 and max((line["epoch"] for line in lines if "loss" in line), default=0) < required(
            self.runs[name].epochs
        ):
            return None  # it was asked to stop
        if code != 0:
            last = file.with_suffix(".log").read_text(errors="replace").strip().splitlines()[-1:]
            self.console.print(f"  {name}: failed ({'; '.join(last)}); run the same command again to go on")
            return None
        model = weights.load(run).to(self.device)
        train, val = self.data
        found = knn.evaluate(model, KnnOptions(model=str(run), data=train, val=val, k=(K,)), self.device)
        return {
            "options": _plain(self.runs[name]),
            "knn": found.figures[f"knn{K}_top1"],
            "untrained": next((line[f"knn{K}_top1"] for line in lines if f"knn{K}_top1" in line), None),
            "collapse": collapsed,
            "minutes": (time.monotonic() - before) / 60,
        }

    def _save(self, results: dict[str, Any]) -> None:
        with files.replacing(self.results_file) as temporary:
            temporary.write_text(json.dumps(results, indent=1))


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def _plain(options: TrainOptions) -> dict[str, Any]:
    """Options as JSON would give them back, without what may differ from machine to machine."""
    flat = {k: v for k, v in flatten(options).items() if k not in FREE_ON_RESUME and v is not None}
    return json.loads(json.dumps(flat))


def _short(result: dict[str, Any]) -> str:
    warning = ", collapsed" if result["collapse"] else ""
    return f"k-NN {result['knn']:.1f} %{warning} ({result['minutes']:.0f} minutes)"


def rows_of(table: Table, results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Header and rows of text: name, ours, collapse, the paper's k-NN and linear figures."""
    number = lambda value: "" if value is None else f"{value:.1f}"  # noqa: E731
    header = ["row", f"k-NN (k = {K})", "collapse reported", "paper: k-NN", "paper: linear", "minutes"]
    body = []
    for row in table.rows:
        result = results.get(row.name, {})
        collapse = ("yes" if result["collapse"] else "no") if result else ""
        minutes = result.get("minutes")
        body.append(
            [row.name, number(result.get("knn")), collapse, number(row.knn), number(row.linear), number(minutes)]
        )
    return [header, *body]


def markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "| --- |" + " ---: |" * (len(rows[0]) - 1), *lines[1:]]) + "\n"


def plot(table: Table, results: dict[str, dict[str, Any]], path: Path, note: str) -> None:
    """Bars of ours beside the paper's, collapsed rows hatched."""
    names = [row.name for row in table.rows][::-1]
    theirs = {row.name: row.knn if row.knn is not None else row.linear for row in table.rows}
    which = "k-NN" if any(row.knn is not None for row in table.rows) else "linear"
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 0.9 + 0.36 * len(names)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for name in names:
            result = results.get(name)
            if result is not None:
                bar = left.barh(name, result["knn"], color="#2a6f97", hatch="///" if result["collapse"] else None)
                left.bar_label(
                    bar,
                    [f"{result['knn']:.1f}" + (" collapsed" if result["collapse"] else "")],
                    padding=3,
                    bbox={"color": "white", "pad": 0.5},  # the dashed line does not run through it
                )
            value = theirs[name]
            bar = right.barh(name, value or 0, color="#a9b4c2")
            right.bar_label(bar, ["" if value is None else f"{value:.1f}"], padding=3)
        untrained = [r["untrained"] for r in results.values() if r["untrained"] is not None]
        if untrained:
            left.axvline(untrained[0], color="#c1121f", linewidth=1, linestyle="--", label="untrained")
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
    if options.data is None:
        raise ValueError("dino ablate needs images with labels for the k-NN; give them with --data.")
    ablation = Ablation(options)
    for asked in (signal.SIGINT, signal.SIGTERM):  # even where a shell's background job ignores them
        signal.signal(asked, signal.default_int_handler)
    results = ablation.work()
    rows, folder = rows_of(ablation.table, results), ablation.folder
    (folder / "table.md").write_text(f"{ablation.table.title}, {options.scale} scale\n\n{markdown(rows)}")
    with open(folder / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    plot(ablation.table, results, folder / "table.png", f"{options.scale} scale")
    print(markdown(rows), end="")
    print(f"Written: {folder / 'table.md'}, {folder / 'table.csv'}, {folder / 'table.png'}")
    return 0 if len(results) == len(ablation.table.rows) else 1
