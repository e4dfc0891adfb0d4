"""`dino eval all`, and what a run and its report keep of evaluations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dino
from dino.cli import main
from dino.engine.log import read_evaluations
from dino.options import replace
from dino.options.train import TrainOptions
from drawing import draw_square, draw_video, lay_out_landmarks
from helpers import TINY, draw_images


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("everything")
    photos = draw_images(root / "photos", 40)
    options = replace(TrainOptions(), TINY | {"epochs": 1, "model.depth": 4})
    return dino.train(options, data=str(photos), out=str(root / "run")), photos


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return shutil.copytree(trained[0], tmp_path / "run")


def evaluate(name: str, *arguments: object) -> int:
    return main(["eval", name, *map(str, arguments)])


def draw_masked(folder: Path) -> None:
    (folder / "masks").mkdir(parents=True)
    for i in range(6):
        draw_square(folder / "images" / f"{i}.png", seed=i)
        mask = np.pad(np.full((16, 16), 255, np.uint8), ((8, 16), (16, 24)))
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")


@pytest.mark.slow
def test_class_folders_and_the_report(trained, run, tmp_path, capsys):
    file = tmp_path / "all.json"
    assert evaluate("all", run, "--data", trained[1], "--json", file) == 0
    said, found = capsys.readouterr().out, json.loads(file.read_text())
    assert [*found["results"]] == ["knn", "linear", "lowshot", "retrieval"]
    for name, result in found["results"].items():
        assert result == json.loads((run / "eval" / f"{name}.json").read_text())
        assert any(result["floors"].values())
        for figure, value in result["figures"].items():
            (line,) = (line for line in said.splitlines() if figure in line.split())
            floors = result["floors"].get(figure, {})
            best = max(floors, key=floors.get, default="")
            assert line.removeprefix(name).split()[1] == f"{value:.2f}"
            assert line.endswith(f"{floors[best]:.2f}  {best}" if best else f"{value:.2f}")
    left_out = [line.split(": ")[1] for line in said.splitlines() if line.startswith("Left out: ")]
    assert left_out == ["finetune", "copydetect", "masks", "segment", "davis"]
    assert said.splitlines()[-1] == f"For the run's report: dino report {run}"

    assert evaluate("knn", f"{run}:last", "--data", trained[1], "--k", 5) == 0
    lines = read_evaluations(run / "evaluations.jsonl")
    assert [line["evaluation"] for line in lines] == ["knn", "linear", "lowshot", "retrieval", "knn"]
    assert [line["teacher"] for line in lines] == ["best"] * 4 + ["last"]
    assert lines[-1]["options"] == {"data": str(trained[1]), "k": [5]}
    assert isinstance(lines[-1]["step"], int)
    again = lines[-1] | {"figures": {"knn5_top1": 12.34}}  # the newest of the same counts
    del again["warning"]  # as an earlier version wrote it
    again_warned = lines[1] | {"warning": "Warning: 3 of 5 & more."}
    broken = [lines[0] | {"figures": {"knn5_top1": "<b>"}}, {"evaluation": "knn"}]
    with open(run / "evaluations.jsonl", "a") as log:
        log.writelines(json.dumps(line) + "\n" for line in [*broken, again, again_warned])
        log.write('{"evaluation": "kn')
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "<h2>What was measured</h2>" in page
    section = page.partition("<h2>What was measured</h2>")[2].partition("</section>")[0]
    assert section.count("<tbody>") == 5
    assert '<td>knn5_top1</td><td class="number">12.34</td>' in section
    assert "Warning: 3 of 5 &amp; more." in section
    for line in lines[:4]:
        assert all(
            f'<td>{figure}</td><td class="number">{value:.2f}</td>' in section
            for figure, value in line["figures"].items()
        )
    assert f"best, step {lines[0]['step']}" in section
    dino.train(replace(TrainOptions(), TINY | {"epochs": 1, "overwrite": True}), data=str(trained[1]), out=str(run))
    assert not (run / "evaluations.jsonl").exists()


@pytest.mark.slow
def test_one_failure_does_not_lose_the_others(run, tmp_path, capsys):
    """A folder of masks, a video, copies and landmarks; no image may be taken for a class."""
    data = lay_out_landmarks(tmp_path / "data")
    draw_masked(data)
    draw_video(data, "walk")
    for name in ("originals", "copies"):
        shutil.copytree(data / "images", data / name)
    everything = ["retrieval", "copydetect", "masks", "segment", "davis"]
    assert evaluate("all", run, "--data", data, "--json", tmp_path / "all.json") == 0
    found = json.loads((tmp_path / "all.json").read_text())
    assert [*found["results"]] == everything
    assert all(any(result["floors"].values()) for name, result in found["results"].items() if name != "retrieval")
    assert "train/" in found["left_out"]["knn"]
    # A square of 16 x 16 in 40 x 56 pixels, of which masks see whole patches.
    assert found["results"]["masks"]["floors"]["jaccard_best_head"]["a mask of the whole image"] == pytest.approx(
        11.4, abs=3
    )
    assert found["results"]["copydetect"]["floors"]["copies_map"]["raw 32x32 pixels"] == 100  # copies are the originals
    davis = found["results"]["davis"]
    assert davis["floors"]["jf_mean"]["the first mask, left where it is"] < davis["figures"]["jf_mean"]
    capsys.readouterr()

    (data / "masks" / "0.png").unlink()
    assert evaluate("all", run, "--data", data, "--json", tmp_path / "all.json") == 1
    found, said = json.loads((tmp_path / "all.json").read_text()), capsys.readouterr()
    assert [*found["failed"]] == ["masks", "segment"]
    assert [*found["results"]] == ["retrieval", "copydetect", "davis"]
    assert "Failed: masks: 1 of the 6 images" in said.out
    assert "davis" in said.out


def test_data_that_allow_nothing(saved_model, tmp_path, capsys):
    draw_square(tmp_path / "flat" / "a.png")
    assert evaluate("all", saved_model, "--data", tmp_path / "flat") == 2
    said = capsys.readouterr().err
    assert "allows no evaluation: there are no class folders" in said
    assert "Traceback" not in said


def test_a_run_that_cannot_be_written_is_measured_all_the_same(trained, run, capsys):
    (run / "eval").write_text("in the way, as is a folder that is read-only")
    (run / "evaluations.jsonl").mkdir()
    assert evaluate("knn", run, "--data", trained[1], "--k", 5) == 0
    said = capsys.readouterr().out
    assert "knn5_top1" in said
    assert f"Warning: {run} does not keep these figures (Is a directory); --json FILE writes them elsewhere." in said
    assert "dino report" not in said
