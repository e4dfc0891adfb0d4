"""What settings of `dino train` learn from image sets in minutes: sets x settings x seeds, as tables and curves over time.

    python benchmarks/learning.py EXPERIMENT [--sets a b] [--settings x y] [--seeds 3] [--minutes 30] [--jobs 2] [--threads 1]

EXPERIMENT is a folder with sets.toml and settings/. A set is a table of sets.toml; paths are relative to that file:

    [flowers]
    train = "flowers/train"     # whatever `dino train --data` takes
    val = "flowers/val"         # optional, as --data.val: watched while training, and at the end
    test = "flowers/test"       # optional: classified at the end instead of val
    labels = "folders"          # optional, as --data.labels
    images = "objects/images"   # optional, with masks: images and masks of their objects, as `dino eval masks` takes them
    masks = "objects/masks"

A setting is a file settings/NAME.toml with options of `dino train`; an empty one is the automatic choice. One that says its
own epochs or minutes keeps them. Each run has a folder out/SET/SETTING/seed-SEED. The same command again goes on where it
was stopped or killed, and tries again what failed. `learning_data.py` makes sets from archives.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from filelock import lock_descriptor

import harness
import learning_table
from dino import errors, files
from dino.data.specs import find_kind, make_absolute
from dino.engine.build import Plan
from dino.engine.checkpoint import LOCK, lock_folder
from dino.engine.log import read_metrics
from dino.machine import check_cores
from dino.options import toml

PATHS = ("train", "val", "test", "labels", "images", "masks")
LENGTHS = {"epochs", "minutes", "hours"}
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(Exception):
    """No process is started any more."""


class Run(NamedTuple):
    set: str
    setting: str
    seed: int


class Experiment:
    """The runs of a folder that were chosen, in the order in which they are made: all with the first seed first."""

    def __init__(self, options: argparse.Namespace):
        check_cores("jobs", options.jobs, 4)
        check_cores("threads", options.threads, 1)
        self.options, self.folder, self.out = options, options.experiment, options.experiment / "out"
        sets, found = self.read_sets(), sorted((self.folder / "settings").glob("*.toml"))
        settings = {path.stem: path.resolve() for path in found}
        if not settings:
            raise ValueError(f"{self.folder}/settings holds no TOML file; write one, for a start an empty auto.toml.")
        self.sets = {name: sets[name] for name in choose("set", options.sets, sets)}
        chosen = choose("setting", options.settings, settings)
        base = options.base or ("base" if "base" in chosen else chosen[0])
        chosen = choose("setting", [base, *chosen], settings)
        self.settings = {name: settings[name] for name in chosen}
        self.runs = [Run(s, name, seed) for seed in range(options.seeds) for s in self.sets for name in self.settings]
        self.failed: dict[str, str] = {}  # what -> the last line of its log
        self.processes: list[subprocess.Popen[bytes]] = []
        self.lock, self.stopping = threading.Lock(), False

    def read_sets(self) -> dict[str, dict[str, str]]:
        """All sets, with paths that do not depend on the working directory."""
        path = self.folder / "sets.toml"
        if not path.is_file():
            raise ValueError(f"there is no {path}; {sys.argv[0]} --help says what it holds.")
        try:
            sets = tomllib.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not a valid TOML file: {error}.") from error

        def locate(text: str) -> str:
            beside = self.folder / Path(text).expanduser()
            return make_absolute(text) if find_kind(text) or not beside.exists() else str(beside.resolve())

        for name, given in sets.items():
            if not isinstance(given, dict) or "train" not in given or ("images" in given) != ("masks" in given):
                raise ValueError(f"{path}: set '{name}' needs the path 'train', and images and masks only together.")
            if unknown := sorted(given.keys() - set(PATHS)):
                raise errors.unknown(f"path of set '{name}'", unknown[0], PATHS)
            if wrong := [value for value in given.values() if not isinstance(value, str)]:
                raise ValueError(f"{path}: set '{name}' has {wrong[0]!r} in place of a path; write it in quotes.")
        return {name: {what: locate(text) for what, text in given.items()} for name, given in sets.items()}

    # --- running -----------------------------------------------------------------------------------------------------

    def run_all(self) -> None:
        """Train and measure what is missing, and write the table again after each run."""
        pool = ThreadPoolExecutor(self.options.jobs)
        tasks = {pool.submit(self.measure_floors, name): f"floors of {name}" for name in self.sets}
        tasks |= {pool.submit(self.finish, run): " ".join(map(str, run)) for run in self.runs}
        try:
            for task in as_completed(tasks):
                try:
                    said = task.result()
                except Stopped:
                    continue
                except (subprocess.SubprocessError, OSError, ValueError) as error:
                    self.failed[tasks[task]] = f"{error}"
                    said = f"failed: {error}"
                if said:
                    print(f"{tasks[task]}: {said}", flush=True)
                    self.write_table()
        finally:
            with self.lock:
                self.stopping = True
                for process in self.processes:
                    process.terminate()  # training saves itself
            pool.shutdown(cancel_futures=True)
        self.write_table()

    def call(self, command: Sequence[object], log: Path) -> float:
        """Run a Python program; its output is added to the file `log`. Returns the minutes that it took.

        Raises:
            SubprocessError: it failed; holds the last line of its output.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with open(log, "ab") as output:
            with self.lock:
                if self.stopping:
                    raise Stopped
                # In a session of its own, so that Ctrl-C reaches it once: from here.
                arguments = [sys.executable, *map(str, command)]
                process = subprocess.Popen(arguments, stdout=output, stderr=output, start_new_session=True)
                self.processes.append(process)
            code = process.wait()
            with self.lock:
                self.processes.remove(process)
        if self.stopping:
            raise Stopped
        if code:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise subprocess.SubprocessError(f"{last[0] if last else ''} (exit code {code}; {log})")
        return (time.monotonic() - began) / 60

    def measure(self, name: str, file: Path, log: Path, *flags: object) -> None:
        """Let `learning_figures.py` write `file`."""
        script = Path(__file__).with_name("learning_figures.py")
        given = json.dumps(self.sets[name])
        self.call([script, given, "--json", file, "--threads", self.options.threads, *flags], log)

    def measure_floors(self, name: str) -> str:
        file = self.out / name / "floors.json"
        if not file.is_file():
            self.measure(name, file, file.with_suffix(".log"))
        return ""

    def finish(self, run: Run) -> str:
        """Train `run` to its end and measure it, or what is missing of that; says what was found.

        Raises:
            ValueError: it was begun with other options.
        """
        folder = self.locate(run)
        figures, wanted, model = folder / "figures.json", self.list_flags(run), folder / "run"
        record, setting = folder / "wanted.json", self.settings[run.setting]
        asked = {"flags": wanted, "options": json.loads(json.dumps(tomllib.loads(setting.read_text(encoding="utf-8"))))}
        if record.is_file() and json.loads(record.read_text()) != asked:
            raise ValueError(f"{folder} was begun with other options; move it away, or give the setting another name.")
        if figures.is_file():
            return ""
        folder.mkdir(parents=True, exist_ok=True)
        with files.replacing(record) as temporary:
            temporary.write_text(json.dumps(asked, indent=1))
        free = ["--threads", self.options.threads, "--no-report"]
        minutes = 0.0
        self.wait_for(model)
        if not is_complete(model):
            start = ["--resume", model] if (model / "config.toml").exists() else [setting, *wanted, "--out", model]
            minutes = self.call(["-m", "dino", "train", *start, *free], folder / "train.log")
            if not is_complete(model):
                raise ValueError(f"it was stopped from outside; the same command resumes it ({folder}/train.log)")
        part = folder / "measured.json"
        self.measure(run.set, part, folder / "figures.log", "--run", model, *["--linear"] * self.options.linear)
        lines = read_metrics(model / "metrics.jsonl")
        curve = learning_table.trace_curve(lines, toml.read_recorded(str(model)).batch_size or 1)
        found: dict[str, Any] = json.loads(part.read_text())
        found["trained"]["minutes"] = max(minutes, curve["minutes"][-1])
        found |= {"curve": curve, "collapse": any(line.get("collapse") for line in lines)}
        with files.replacing(figures) as temporary:
            temporary.write_text(json.dumps(found, indent=1))
        part.unlink()
        shown = learning_table.COLUMNS.items()
        return ", ".join(f"{name} {found['trained'][key]:.1f}" for key, name in shown if key in found["trained"])

    def wait_for(self, model: Path) -> None:
        """Wait until no process trains there: where this program was killed by SIGKILL, its runs have gone on."""
        if not (model / LOCK).exists():
            return
        with open(model / LOCK, "ab") as file:
            while not lock_descriptor(file.fileno(), blocking=False):
                if self.stopping:
                    raise Stopped
                time.sleep(1)

    def list_flags(self, run: Run) -> list[str]:
        """The options of `dino train` that the experiment gives beside the file of the setting."""
        given = self.sets[run.set]
        flags = ["--data", given["train"], "--seed", str(run.seed)]
        flags += ["--data.val", given["val"]] if "val" in given else []
        flags += ["--data.labels", given["labels"]] if "labels" in given else []
        own_length = LENGTHS & tomllib.loads(self.settings[run.setting].read_text(encoding="utf-8")).keys()
        return flags if own_length else [*flags, "--minutes", f"{self.options.minutes:g}"]

    def locate(self, run: Run) -> Path:
        return self.out / run.set / run.setting / f"seed-{run.seed}"

    # --- results -----------------------------------------------------------------------------------------------------

    def write_table(self) -> None:
        """table.md and curves.png of all that is finished."""
        results: learning_table.Results = {name: {setting: [] for setting in self.settings} for name in self.sets}
        floors = {}
        for run in self.runs:
            if (file := self.locate(run) / "figures.json").is_file():
                results[run.set][run.setting].append(json.loads(file.read_text()))
        for name in self.sets:
            file = self.out / name / "floors.json"
            floors[name] = json.loads(file.read_text()) if file.is_file() else {}
        text = "\n".join(learning_table.format_set(name, results[name], floors[name]) for name in self.sets)
        if self.failed:
            text += "\nFailed:\n\n" + "".join(f"- {what}: {reason}\n" for what, reason in self.failed.items())
        with files.replacing(self.out / "table.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
        learning_table.draw_curves(results, floors, self.out / "curves.png")


def choose(what: str, wanted: Sequence[str] | None, known: Sequence[str] | dict[str, Any]) -> list[str]:
    """The names wanted, each once; None: all that are known."""
    for name in wanted or ():
        if name not in known:
            raise errors.unknown(what, name, known)
    return list(dict.fromkeys(wanted or known))


def is_complete(run: Path) -> bool:
    """Whether the run was trained to its last step."""
    if not (run / "config.toml").is_file():
        return False
    steps = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    last = steps[-1] if steps else {"step": 0, "epoch": 1}
    return last["step"] >= Plan(toml.read_recorded(str(run)), max(1, round(last["step"] / last["epoch"]))).total


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--sets", nargs="+", help="default: all of sets.toml")
    parser.add_argument("--settings", nargs="+", help="default: all of settings/")
    parser.add_argument("--base", help="setting that the others are compared with; default: 'base', else the first")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of every run")
    parser.add_argument("--minutes", type=float, default=30, help="of a run whose setting does not say its length")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--no-linear", dest="linear", action="store_false", help="leave out the linear probe")
    options = parser.parse_args(arguments)
    if min(options.seeds, options.jobs, options.threads) < 1:
        raise ValueError("--seeds, --jobs and --threads must be at least 1.")
    return options


def main() -> None:
    experiment = Experiment(parse())
    for number in SIGNALS:
        if number in SIGNALS[:2] or signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)
    with lock_folder(experiment.out):
        try:
            experiment.run_all()
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            sys.exit(130)
    print((experiment.out / "table.md").read_text(encoding="utf-8"), end="")
    print(f"Written: {experiment.out}/table.md, curves.png")
    sys.exit(1 if experiment.failed else 0)


if __name__ == "__main__":
    harness.run(main)
