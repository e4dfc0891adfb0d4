"""`dino ablate` through the real command: every row of every table builds; a small table runs, stops and goes on."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import time

import pytest
import tomli_w
import torch

import processes
from dino import paper
from dino.ablate import Ablation
from dino.engine.checkpoint import lock_folder
from dino.options import auto, replace
from dino.options.evaluate import EVALUATIONS
from dino.options.recipes import find_recipe
from dino.options.toml import to_dict
from dino.options.train import TrainOptions
from dino.options.trainings import AblateOptions
from helpers import TINY, dino_command, run_dino


@pytest.fixture
def recipe(tmp_path):
    """The smallest training there is, as a TOML file."""
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(to_dict(replace(TrainOptions(), TINY | {"report": False}))))
    return path


@pytest.mark.parametrize("name", paper.TABLES)
def test_every_row_is_valid_options_at_both_scales(name):
    table = paper.find_table(name)
    assert len({row.name for row in table.rows}) == len(table.rows)
    for row in table.rows:
        full = replace(find_recipe(table.recipe).options, {**table.paper_base, **table.base, **row.changes})
        auto.resolve(full, 1_281_167, 400, on_gpu=True, cores=8)
        replace(find_recipe(paper.TINY_RECIPE).options, {**table.base, **row.tiny, "epochs": paper.TINY_EPOCHS})


@pytest.mark.parametrize(
    ("visible", "gpus", "places"),
    [
        (None, 2, ["cuda:0", "cuda:1"]),
        ("2,3", 2, ["cuda:2", "cuda:3"]),
        ("GPU-8f2a", 1, ["cuda:GPU-8f2a"]),
        ("1,-1,0", 1, ["cuda:1"]),  # CUDA stops at what is not there
        ("", 0, ["cpu", "cpu"]),
    ],
)
def test_rows_run_on_the_gpus_that_were_given(monkeypatch, tmp_path, visible, gpus, places):
    ablation = Ablation(AblateOptions(table="activation", data=str(tmp_path), out=str(tmp_path / "out"), jobs=2))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert ablation._find_places() == places


def table(out):
    with open(out / "table.csv", newline="") as file:
        return list(csv.reader(file))


def test_a_table_runs_skips_what_is_finished_and_is_written(photos, tmp_path, recipe):
    out = tmp_path / "out"
    command = [
        "ablate",
        "activation",
        "--data",
        photos,
        "--recipe",
        recipe,
        "--epochs",
        1,
        "--out",
        out,
        "--jobs",
        2,
        "--no-report",
    ]
    done = run_dino(*command)
    assert done.returncode == 0, done.stderr
    rows = table(out)
    assert [row[0] for row in rows[1:]] == [row.name for row in paper.find_table("activation").rows]
    assert all(0 <= float(row[1]) <= 100 and row[2] in ("yes", "no") for row in rows[1:])
    assert [row[3] for row in rows[1:]] == ["69.7", "68.6", "68.9"]
    assert "| BN, GELU |" in (out / "table.md").read_text()
    assert (out / "table.png").stat().st_size > 10_000
    assert "no BN, ReLU" in done.stdout

    (out / "table.csv").unlink()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.pt")}
    again = run_dino(*command)
    assert again.returncode == 0
    assert "3 finished" in again.stderr
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*.pt")}
    assert table(out) == rows

    other = run_dino(*[2 if word == 1 else word for word in command])
    assert other.returncode == 2
    assert "other options" in other.stderr


MODELS = {
    "vit_small_800ep": "vit_small/16",
    "vit_small_p8": "vit_small/8",
    "vit_base_p16": "vit_base/16",
    "vit_base_p8": "vit_base/8",
    "resnet50_800ep": "resnet50",
    "xcit_small_12_p16": "xcit_small_12_p16_224",
    "xcit_small_12_p8": "xcit_small_12_p8_224",
    "xcit_medium_24_p16": "xcit_medium_24_p16_224",
    "xcit_medium_24_p8": "xcit_medium_24_p8_224",
}


def test_recipes_expect_what_is_published():
    """The recipes lie below paper.py, so that their sentences cannot be made from it."""
    for name, model in MODELS.items():
        knn, linear = paper.FIGURES["knn"][model]["knn20_top1"], paper.FIGURES["linear"][model]["linear_top1"]
        assert find_recipe(name).expected == f"ImageNet k-NN {knn} %, linear {linear} % (reference)"
    rows = {row.name: row for row in paper.TABLES["7"].rows}
    for name, row in (("byol", "BYOL"), ("mocov2", "MoCo-v2"), ("swav", "SwAV")):
        expected = f"ImageNet k-NN {rows[row].knn} %, linear {rows[row].linear} % (reference)"
        assert find_recipe(f"{name}_vit_small").expected == expected
    oxford, oxford_hard, paris, paris_hard = paper.FIGURES["retrieval"]["vit_small/16 of Google Landmarks v2"].values()
    figures = f"rOxford {oxford}/{oxford_hard}, rParis {paris}/{paris_hard}"
    assert figures in find_recipe("vit_small_gldv2").expected


def test_figures_are_of_evaluations_that_exist():
    assert paper.FIGURES.keys() <= EVALUATIONS.keys()


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_goes_on(asked, photos, tmp_path, recipe):
    out = tmp_path / "out"
    command = ["ablate", "activation", "--data", photos, "--recipe", recipe, "--epochs", 3, "--out", out, "--no-report"]
    process = processes.start(dino_command(*command), stderr=subprocess.DEVNULL, start_new_session=True)
    first = out / "no-bn-gelu" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(asked)
    assert process.wait(60) == 130
    assert len(json.loads((out / "results.json").read_text()) if (out / "results.json").exists() else {}) < 3
    other = run_dino(*["4" if word == 3 else word for word in command])
    assert other.returncode == 2
    assert "other options" in other.stderr
    done = run_dino(*command)
    assert done.returncode == 0, done.stderr
    assert len(json.loads((out / "results.json").read_text())) == 3


def test_an_ablation_has_one_writer(photos, tmp_path, recipe):
    with lock_folder(tmp_path / "out"):
        busy = run_dino("ablate", "activation", "--data", photos, "--recipe", recipe, "--out", tmp_path / "out")
    assert busy.returncode == 2
    assert "another process is writing" in busy.stderr


def test_kind_to_mistakes(photos, tmp_path, recipe):
    for words, said in (
        (["ablate", "8", "--data", photos], "there is no table '8'"),
        (["ablate", "7"], "--data"),
        (["ablate", "7", "--data", photos, "--recipe", tmp_path / "no.toml"], "no options file"),
        (["ablate", "7", "--data", photos, "--out", photos], "holds no ablation"),
        (["ablate", "7", "--data", photos, "--jobs", "0"], "jobs is 0"),
    ):
        done = run_dino(*words)
        assert done.returncode == 2, (words, done.stderr)
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    listed = run_dino("ablate")
    assert listed.returncode == 0
    assert "Sinkhorn-Knopp" in listed.stdout
