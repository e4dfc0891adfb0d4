"""Where the metrics of a run go beside `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow, Trackio, or a class of yours.

A tracker is any class with the methods of `Tracker` that is built from a `Start`; `--log.to package.module:Class` takes it.
Each has its own account, server and offline mode, by its own variables (WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_DIR, ...).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar

from dino import errors, files
from dino.terminal import say

PROJECT = "dino"
KNOWN = "trackers.json"  # in a run's folder: what each tracker calls the run, and its page


class Start(NamedTuple):
    """A run, as it starts or goes on.

    Args:
        step: after which it goes on; 0 for a new one.
        options: by dotted name, without those that are None.
        id: what the tracker called the run before; "" for a new one.
    """

    folder: Path
    step: int
    options: dict[str, Any]
    id: str


class Tracker(Protocol):
    id: str  # by which it finds the run again
    url: str  # page of the run; "" if it has none

    def write(self, step: int, values: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Scalars as a file of TensorBoard. Written in this thread, where a full disk can be told; SummaryWriter has its own."""

    id = url = ""

    def __init__(self, start: Start):
        folder = start.folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{platform.node()}.{os.getpid()}"
        self.records = RecordWriter(open(folder / name, "wb"))  # noqa: SIM115 - lives as long as the run
        self._write(file_version="brain.Event:2")
        # Events of steps beyond the checkpoint are marked as superseded.
        self._write(step=start.step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._write(step=step, summary=scalar(name, value))
        self.records.flush()

    def _write(self, **what: Any) -> None:
        self.records.write(Event(wall_time=time.time(), **what).SerializeToString())

    def close(self) -> None:
        self.records.close()


class WandB:
    def __init__(self, start: Start):
        wandb = errors.import_optional("wandb", "--log.to wandb needs wandb", "tracking")
        identity = {"id": start.id, "resume": "allow"} if start.id else {}
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=start.folder.name,
            dir=start.folder,
            config=start.options,
            settings=wandb.Settings(silent=True),
            **identity,
        )
        self.id, self.url = self.run.id, self.run.url or ""

    def write(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    def __init__(self, start: Start):
        # Without a server, and without the database that all of MLflow would bring, it writes files.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        if importlib.util.find_spec("sqlalchemy") is None:
            os.environ.setdefault("MLFLOW_TRACKING_URI", "mlruns")
        mlflow = errors.import_optional("mlflow", "--log.to mlflow needs MLflow", "tracking")
        client: Any = mlflow.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        self.client, self.id = client, start.id
        if not start.id:
            found = client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else client.create_experiment(name)
            self.id = client.create_run(experiment, run_name=start.folder.name).info.run_id
            for option, value in start.options.items():
                client.log_param(self.id, option, value)
        page = f"#/experiments/{client.get_run(self.id).info.experiment_id}/runs/{self.id}"
        server = mlflow.get_tracking_uri()
        self.url = f"{server.rstrip('/')}/{page}" if server.startswith("http") else ""

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.client.log_metric(self.id, name, value, step=step)

    def close(self) -> None:
        self.client.set_terminated(self.id)


class Trackio:
    def __init__(self, start: Start):
        trackio = errors.import_optional("trackio", "--log.to trackio needs Trackio", "tracking")
        self.id = start.id or f"{start.folder.name}-{time.time():.0f}"  # a name that no other run has
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        with contextlib.redirect_stdout(None):
            self.run = trackio.init(project=project, name=self.id, config=start.options, resume="allow")
        self.url = self.run.url or ""

    def write(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(None):
            self.run.finish()


TRACKERS: dict[str, Callable[[Start], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}


class Guarded:
    """A tracker whose failures do not end a training: it falls silent, and says so once.

    Errors of the disk are told by all, as they hold for the run, too.
    """

    def __init__(self, name: str, build: Callable[[], Tracker]):
        self.name, self.tracker = name, None
        try:
            self.tracker = build()
        except (ValueError, OSError):
            raise
        except Exception as error:  # of another library, which has its own kinds
            raise ValueError(f"--log.to {name}: {errors.first_line(error)}; mend that, or leave {name} out.") from error

    def write(self, step: int, values: dict[str, float]) -> None:
        self._attempt(lambda tracker: tracker.write(step, values))

    def close(self) -> None:
        self._attempt(lambda tracker: tracker.close())

    def _attempt(self, work: Callable[[Tracker], None]) -> None:
        try:
            if self.tracker is not None:
                work(self.tracker)
        except OSError:
            if self.name == "tensorboard":
                raise
            self.fail("it cannot be reached")
        except Exception as error:
            self.fail(errors.first_line(error))

    def fail(self, why: str) -> None:
        self.tracker = None
        say(f"Warning: {self.name} takes no more metrics ({why}); the run goes on, and metrics.jsonl has all of them.")


def find_tracker(name: str) -> Callable[[Start], Tracker]:
    """The class of a tracker: a known one, or "package.module:Class".

    Raises:
        ValueError: there is none.
    """
    if name in TRACKERS:
        return TRACKERS[name]
    module, _, kind = name.partition(":")
    if not kind:
        raise errors.unknown("tracker", name, [*TRACKERS, "package.module:Class"])
    try:
        if os.getcwd() not in sys.path:  # where a class of one's own may lie
            sys.path.append(os.getcwd())
        return getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--log.to {name} cannot be imported ({errors.first_line(error)}); check its name.") from error


def open_trackers(names: tuple[str, ...], folder: Path, step: int, options: dict[str, Any]) -> list[Guarded]:
    """Start or go on with what `names` name, and write down what each calls the run in `folder`."""
    path = folder / KNOWN
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() and step else {}

    def build(name: str) -> Tracker:
        return find_tracker(name)(Start(folder, step, options, known.get(name, {}).get("id", "")))

    opened = [Guarded(name, functools.partial(build, name)) for name in names]
    pages = {each.name: {"id": each.tracker.id, "url": each.tracker.url} for each in opened if each.tracker}
    if pages := {name: page for name, page in pages.items() if page["id"]}:
        files.write(path, json.dumps(known | pages, indent=2) + "\n")
    return opened


def read_pages(folder: Path) -> dict[str, str]:
    """The pages of the run in `folder`, by tracker."""
    with contextlib.suppress(OSError, ValueError):
        pages = json.loads((folder / KNOWN).read_text())
        return {name: page["url"] for name, page in pages.items() if page["url"].startswith("http")}
    return {}
