"""Metrics to other programs: each library's own offline mode gets the numbers of metrics.jsonl, also after a resume."""

from __future__ import annotations

import json
import sqlite3
import sys
from typing import Any, ClassVar

import pytest

import dino
from dino import cli
from dino.engine import trackers
from dino.engine.log import read_metrics
from dino.engine.trackers import find_tracker
from helpers import TINY, draw_images, tiny_flags

OPTIONS: dict[str, Any] = {n: v for n, v in TINY.items() if n not in ("data.path", "out")} | {
    "epochs": 2,
    "log.every": 2,
}


@pytest.fixture
def photos(tmp_path):
    return draw_images(tmp_path / "photos", 16)


def train_in_halves(photos, out, name):
    """A run that was stopped after 3 steps and resumed; returns the losses by step of metrics.jsonl."""
    dino.train(data=photos, out=out, **OPTIONS | {"log.to": (name,), "stop_after": 3})
    first = json.loads((out / "trackers.json").read_text())[name]
    dino.train(resume=out, stop_after=None)
    assert json.loads((out / "trackers.json").read_text())[name] == first, "it is the same run there"
    return {line["step"]: line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line}, first


def test_mlflow_gets_the_metrics(photos, tmp_path, monkeypatch):
    """As our extra installs it, without a server or a database: in files."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(name, "")  # what the tracker sets ends with the test
        monkeypatch.delenv(name)
    losses, known = train_in_halves(photos, tmp_path / "run", "mlflow")
    import mlflow

    client = mlflow.MlflowClient()
    found = client.get_metric_history(known["id"], "loss")
    assert {metric.step: pytest.approx(metric.value) for metric in found} == losses
    assert client.get_run(known["id"]).data.params["model.arch"] == OPTIONS["model.arch"]
    assert (tmp_path / "mlruns").is_dir()


def test_trackio_gets_the_metrics(photos, tmp_path, monkeypatch):
    import trackio.utils

    for module in (trackio.utils, trackio.sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio", raising=False)
    losses, known = train_in_halves(photos, tmp_path / "run", "trackio")
    with sqlite3.connect(next((tmp_path / "trackio").glob("*.db"))) as database:
        rows = database.execute("select step, metrics from metrics where run_name = ?", [known["id"]]).fetchall()
    found = {step: json.loads(metrics)["loss"] for step, metrics in rows if b"loss" in metrics}
    assert found == pytest.approx(losses)


def test_wandb_gets_the_metrics_offline(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    losses, known = train_in_halves(photos, tmp_path / "run", "wandb")
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{known['id']}/*.wandb"))
    assert len(files) == 2, "one for each half"
    from wandb.proto import wandb_internal_pb2

    found = {}
    for content in (content for path in files for content in read_records(path.read_bytes())):
        record = wandb_internal_pb2.Record.FromString(content)
        items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        if "loss" in items:
            found[record.history.step.num] = items["loss"]
    assert found == pytest.approx(losses)


def read_records(content: bytes, block: int = 2**15) -> list[bytes]:
    """The records of a file of wandb: a log of LevelDB behind a header of 7 bytes."""
    records, place, begun = [], 7, b""
    while place + 7 <= len(content):
        if block - place % block < 7:  # no header fits into the rest of a block
            place += block - place % block
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        begun += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(begun)
            begun = b""
    return records


class Mine:
    """A tracker of somebody else."""

    id, url, seen = "7", "http://127.0.0.1/7", []

    def __init__(self, start: trackers.Start):
        self.folder = start.folder

    def write(self, step: int, values: dict[str, float]) -> None:
        if step > 4:
            raise RuntimeError("the server is down")
        self.seen.append(step)

    def close(self) -> None:
        self.seen.append("closed")


def test_a_class_of_somebody_else_is_taken_and_its_failure_does_not_end_the_run(photos, tmp_path, capsys):
    out = dino.train(data=photos, out=tmp_path / "run", **OPTIONS | {"log.to": ("test_trackers:Mine",), "report": True})
    assert Mine.seen == [0, 2, 3, 3, 4], "log lines and checks"
    said = capsys.readouterr().err
    assert said.count("test_trackers:Mine takes no more metrics (the server is down)") == 1
    assert f'<a href="{Mine.url}">' in (out / "report.html").read_text()


class Counting(Mine):
    started: ClassVar[list[str]] = []

    def __init__(self, start: trackers.Start):
        self.started.append(start.folder.name)

    def write(self, step: int, values: dict[str, float]) -> None:
        pass


def test_the_trial_of_a_run_with_minutes_starts_no_run_elsewhere(photos, tmp_path):
    changes = {"epochs": None, "minutes": 0.2, "log.to": ("test_trackers:Counting",), "optim.warmup_epochs": None}
    dino.train(data=photos, out=tmp_path / "run", **OPTIONS | changes | {"method.teacher_temp_epochs": None})
    assert Counting.started == ["run"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tensorbord", "it is tensorboard, wandb"),
        ("nosuch:Mine", "cannot be imported"),
        ("test_trackers:No", "check its name"),
    ],
)
def test_a_wrong_name_is_misuse(photos, tmp_path, capsys, name, words):
    assert (
        cli.main(["train", "--data", str(photos), *tiny_flags(), "--log.to", name, "--out", str(tmp_path / "run")]) == 2
    )
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "the same command with the right name begins"


def test_a_class_in_the_working_directory_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_tracker_of_mine.py").write_text("class Mine: ...")
    assert find_tracker("own_tracker_of_mine:Mine").__name__ == "Mine"


def test_runs_of_the_version_before_can_be_resumed(photos, tmp_path):
    out = dino.train(data=photos, out=tmp_path / "run", **OPTIONS | {"stop_after": 3})
    config = (out / "config.toml").read_text()
    assert "to = []" in config
    (out / "config.toml").write_text(config.replace("to = []", "tensorboard = true"))
    dino.train(resume=out, stop_after=None)
    assert list((out / "tensorboard").iterdir())
