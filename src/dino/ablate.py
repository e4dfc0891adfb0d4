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

import tomli_w
import torch

from dino import distributed, files, paper, slurm, weights
from dino.data.open import open_labeled_pair
from dino.data.specs import make_absolute, split_folders
from dino.engine.checkpoint import LOCK, lock_folder
from dino.engine.log import read_metrics
from dino.eval import knn
from dino.machine import check_cores, count_spare_cores
from dino.options import flatten, replace, required, toml
from dino.options.evaluate import KnnOptions
from dino.options.recipes import choose_base
from dino.options.resume import FREE_ON_RESUME
from dino.options.train import AUTO, TrainOptions
from dino.options.trainings import AblateOptions, SlurmOptions
from dino.paper import Row
from dino.report.table import draw_bars, format_markdown, format_rows
from dino.terminal import Terminal

K = 20
FIGURE = f"knn{K}_top1"


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
            if self.options.slurm is None:
                self._run_missing(results)
            else:
                self._send_missing(results, self.options.slurm)
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
                    self._keep(results, name, result)
                    self.terminal.update(len(results), "training; each row's output is in its .log file")
        finally:
            self.stopping = True
            for process in self.running.copy():
                process.terminate()  # the row saves itself; the same command resumes it
            pool.shutdown()
            self.terminal.stop()

    def _keep(self, results: dict[str, dict[str, Any]], name: str, result: dict[str, Any]) -> None:
        results[name] = result
        files.write(self.results_file, json.dumps(results, indent=1))
        warning = ", collapsed" if result["collapse"] else ""
        self.terminal.say(f"  {name}: k-NN {result['knn']:.1f} %{warning} ({result['minutes']:.0f} minutes)")

    def _find_places(self) -> list[str]:
        """Where rows are trained at the same time: the GPUs that this process may use, or CPU jobs."""
        gpus = torch.cuda.device_count() if self.options.device != "cpu" else 0
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = [name.strip() for name in given.split(",")] if given else range(gpus)
        return [f"cuda:{name}" for name in names][:gpus] if gpus else ["cpu"] * self.options.jobs

    def _run_row(self, name: str, place: str) -> dict[str, Any] | None:
        """Train row `name` to its end and evaluate it; None when it did not get there."""
        options, environment = self.runs[name], dict(os.environ)
        flags = self._write_row(name)
        if place.startswith("cuda"):
            environment["CUDA_VISIBLE_DEVICES"] = place.removeprefix("cuda:")
            if options.data.num_workers is None:
                flags += ["--data.num-workers", str(count_spare_cores(len(self._find_places())))]
        else:
            flags += ["--device", "cpu", "--threads", str(options.threads or count_spare_cores(self.options.jobs))]
        command, before = [sys.executable, "-m", "dino", *flags], time.monotonic()
        with open(file := self.folder / "rows" / f"{make_slug(name)}.log", "ab") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            self.running.append(process)
            code = process.wait()
            self.running.remove(process)
        if code != 0:
            last = file.read_text(errors="replace").strip().splitlines()[-1:]
            self.terminal.say(f"  {name}: failed ({'; '.join(last)}); run the same command again to go on")
            return None
        run, (train, val) = self.folder / make_slug(name), self.data
        if not self._is_trained(run):
            return None  # it was asked to stop
        model = weights.load(f"{run}:last").to(self.device)  # as the paper, which chooses none by its test images
        found = knn.evaluate(model, KnnOptions(model=str(run), data=train, val=val, k=(K,)), self.device)
        return self._describe(name, found.figures[FIGURE], time.monotonic() - before)

    def _write_row(self, name: str) -> list[str]:
        """Write the options of row `name`, and return the command that starts or continues its run."""
        file, run = self.folder / "rows" / f"{make_slug(name)}.toml", self.folder / make_slug(name)
        file.write_text(tomli_w.dumps(toml.to_dict(self.runs[name])))
        quick = [] if self.options.report else ["--no-report"]
        return ["train", str(file), "--out", str(run), "--resume", AUTO, *quick]

    def _is_trained(self, run: Path) -> bool:
        epochs = [line["epoch"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
        return bool(epochs) and max(epochs) >= required(toml.read_recorded(str(run)).epochs)

    def _describe(self, name: str, accuracy: float, seconds: float) -> dict[str, Any]:
        """The result of row `name`, from its k-NN accuracy in percent and from what its run has logged."""
        lines = read_metrics(self.folder / make_slug(name) / "metrics.jsonl")
        return {
            "options": _flatten(self.runs[name]),
            "knn": accuracy,
            "untrained": next((line[FIGURE] for line in lines if FIGURE in line), None),
            "collapse": any(line.get("collapse") for line in lines),
            "minutes": seconds / 60,
        }

    def _send_missing(self, results: dict[str, dict[str, Any]], more: tuple[str, ...]) -> None:
        """Collect the rows that Slurm has finished; send the others, unless some are still there, as one array of jobs."""
        for name in self.runs:
            if name not in results and (found := self._collect(name)):
                self._keep(results, name, found)
        missing, note = [name for name in self.runs if name not in results], self.folder / "rows" / "slurm-job"
        if not missing:
            return
        job = note.read_text() if note.exists() else ""
        if left := slurm.count_left(job):
            self.terminal.say(f"Job {job} still has {left} of them; the same command collects them.")
            return
        options = SlurmOptions(gpus=int(self.options.device != "cpu"), slurm=more)
        (train, val), jobs = self.data, []
        evaluation = ["--data", train, *(["--val", val] if val else []), "--k", str(K), "--device", self.options.device]
        for name in missing:
            run = self.folder / make_slug(name)
            training = [*self._write_row(name), "--device", self.options.device]
            jobs.append(slurm.Job([training, ["eval", "knn", f"{run}:last", *evaluation]]))
        job = slurm.send(jobs, self.folder / "rows", f"ablate-{self.options.table}", options)
        note.write_text(job)
        self.terminal.say(
            f"Job {job}: {len(jobs)} rows are on their way; their output is in {self.folder}/rows/{job}_*.out. "
            f"The same command collects them; scancel {job} cancels them."
        )

    def _collect(self, name: str) -> dict[str, Any] | None:
        """The result of row `name` from the files that its job has left; None where it has not got to the end."""
        run = self.folder / make_slug(name)
        file, last = run / "eval" / "last" / "knn.json", run / "teacher.safetensors"
        if not (file.exists() and self._is_trained(run)) or file.stat().st_mtime < last.stat().st_mtime:
            return None
        took = file.stat().st_mtime - (self.folder / "rows" / f"{make_slug(name)}.toml").stat().st_mtime
        return self._describe(name, json.loads(file.read_text())["figures"][FIGURE], took)


def make_slug(name: str) -> str:
    """A row's name as the name of its files."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def _flatten(options: TrainOptions) -> dict[str, Any]:
    """Options that are set, as JSON gives them back, without those that may differ from machine to machine."""
    flat = {k: v for k, v in flatten(options).items() if k not in FREE_ON_RESUME and v is not None}
    return json.loads(json.dumps(flat))


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
    if options.slurm is not None and len(results) < len(ablation.table.rows):
        return 0  # the others are on their way
    rows = format_rows(ablation.table, results, f"k-NN (k = {K})")
    table, note = ablation.folder / "table", f"{options.scale} scale"
    table.with_suffix(".md").write_text(f"{ablation.table.title}, {note}\n\n{format_markdown(rows)}")
    with open(table.with_suffix(".csv"), "w", newline="") as file:
        csv.writer(file).writerows(rows)
    draw_bars(ablation.table, results, table.with_suffix(".png"), note)
    print(format_markdown(rows), end="")
    print(f"Written: {table}.md, {table}.csv, {table}.png")
    return 0 if len(results) == len(ablation.table.rows) else 1
