"""`dino doctor`: what is wrong is found, with the command that helps and an exit code for scripts."""

from __future__ import annotations

import importlib.metadata
import shutil
import socket
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dino
from dino import cli, doctor
from dino.engine.checkpoint import lock_folder
from dino.weights.checkpoints import get_step, list_checkpoints
from helpers import TINY, draw_images


def examine(target, capsys) -> tuple[int, str]:
    code = cli.main(["doctor", *([] if target is None else [str(target)])])
    captured = capsys.readouterr()
    assert not captured.err, captured.err
    return code, captured.out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = tmp_path_factory.mktemp("doctor")
    photos = draw_images(place / "photos", 24)
    return dino.train(
        data=photos, out=place / "run", **{n: v for n, v in TINY.items() if n not in ("data.path", "out")}
    )


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def test_a_machine_is_described_and_what_is_missing_is_named(capsys, monkeypatch):
    there = importlib.metadata.version
    refused = {"av", "gradio"}

    def version(name: str) -> str:
        if name in refused:
            raise importlib.metadata.PackageNotFoundError(name)
        return there(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(doctor.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        code, said = examine(None, capsys)
        assert "answers: weights by name can be downloaded" in said
    assert code == 0, said
    assert f"dino {dino.__version__}, Python" in said
    assert "video, for video files (dino video); without av" in said
    assert said.count("pip install") == 1, said
    assert "pip install 'dino-vision[app,video]'" in said
    assert "cannot be reached" in examine(None, capsys)[1], "the server is closed"
    monkeypatch.setattr(doctor.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in doctor.examine_network().text


def test_programs_that_want_more_cores_than_there_are(monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (4.7, 0, 0), raising=False)
    monkeypatch.setattr(doctor, "count_cores", lambda: 2)
    assert "Other programs ask for about 4.7 cores; there are 2" in list(doctor.examine_cores())[-1].text


def test_every_extra_of_users_says_what_it_is_for():
    extras = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
    assert doctor.EXTRAS.keys() == extras["optional-dependencies"].keys() - {"all", "dev", "docs"}


def test_a_full_disk_is_bad_and_one_that_fills_is_noted(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    levels = [doctor.examine_disk(tmp_path, free * share, "help").level for share in (0.5, 2, 20)]
    assert levels == ["good", "note", "bad"]


def test_images_that_are_broken_gray_or_repeated_are_found(tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        pixels = np.repeat(rng.integers(0, 256, (8, 8, 1), dtype=np.uint8), 3, axis=2)
        Image.fromarray(pixels).resize((64, 48), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    code, said = examine(folder, capsys)
    assert code == 0
    assert "--model.in-channels 1" in said
    assert "0 of 12 are near-copies" in said
    shutil.copy(folder / "3.png", folder / "copy.png")
    (folder / "broken.png").write_bytes(b"no image")
    code, said = examine(folder, capsys)
    assert code == 1
    assert "1 of 14 cannot be read, first broken.png" in said
    assert f"dino duplicates {folder}" in said


def test_a_healthy_run_and_one_that_is_running(run, capsys):
    said = examine(run, capsys)[1]
    assert "It is complete (step" in said
    assert "It can be resumed from step" in said
    assert "images/s" in said
    assert "Verdict: " in said
    with lock_folder(run):
        assert "It is running, at step" in examine(run, capsys)[1]


def test_a_run_that_stopped_is_a_note_with_the_command_that_goes_on(run, capsys):
    config = run / "config.toml"
    config.write_text(config.read_text().replace("epochs = 3\n", "epochs = 6\n", 1))
    (run / "report.html").touch()
    step = get_step(list_checkpoints(run / "checkpoints")[-1])
    assert f" ! It stopped at step {step} of {2 * step}\n     -> dino train --resume {run}\n" in examine(run, capsys)[1]


def test_metrics_that_were_lost_do_not_contradict_the_checkpoint(run, capsys):
    step = get_step(list_checkpoints(run / "checkpoints")[-1])
    (run / "metrics.jsonl").write_text("")
    code, said = examine(run, capsys)
    assert f"It is complete (step {step} of {step})" in said
    assert f" ! metrics.jsonl has lost lines: it ends at step 0, and there is a checkpoint of step {step}" in said
    assert code == 0, said


def test_damaged_checkpoints_and_lost_images_are_found(run, capsys):
    older, newest = list_checkpoints(run / "checkpoints")
    newest.write_bytes(newest.read_bytes()[:-1000])
    said = examine(run, capsys)[1]
    assert f" ! The newest checkpoint, step {get_step(newest)}, is damaged: " in said
    assert f"It can be resumed from step {get_step(older)}\n" in said
    older.write_bytes(b"")
    code, said = examine(run, capsys)
    assert code == 1
    assert " X Checkpoints: " in said
    config = (run / "config.toml").read_text()
    photos = tomllib.loads(config)["data"]["path"]
    (run / "config.toml").write_text(config.replace(photos, f"{run}/gone"))
    code, said = examine(run, capsys)
    assert code == 1
    assert "--data NEW" in said


def test_damaged_teachers_are_found_and_a_resume_writes_them_again(run, capsys):
    for name in ("best.safetensors", "teacher.safetensors"):
        (run / name).write_bytes((run / name).read_bytes()[:-1000])
    said = examine(run, capsys)[1]
    for name in ("best", "teacher"):
        assert f" X {name}.safetensors is damaged\n     -> Write it again: dino train --resume {run}\n" in said
    dino.train(resume=run)
    capsys.readouterr()
    assert "is damaged" not in examine(run, capsys)[1]
    shutil.rmtree(run / "checkpoints")
    (run / "best.safetensors").write_bytes(b"")
    assert f"Take the other teacher: {run}:last\n" in examine(run, capsys)[1]
    dino.load(f"{run}:last")


def test_a_run_without_its_options_and_a_folder_of_runs_are_recognized(run, capsys):
    shutil.copytree(run, run.parent / "other")
    assert cli.main(["doctor", str(run.parent)]) == 2
    assert f"holds 2 runs; give one of them: dino doctor {run.parent}/other" in capsys.readouterr().err
    (run / "config.toml").unlink()
    code, said = examine(run, capsys)
    assert code == 1
    assert f" X {run} is a run that has lost its config.toml\n" in said
    assert f"dino train --init {run} --data NEW" in said
    (run / "teacher.safetensors").unlink()
    assert "Copy it from a backup, or from a run with the same options\n" in examine(run, capsys)[1]


def test_what_is_neither_a_run_nor_images_is_misuse(tmp_path, capsys):
    assert cli.main(["doctor", str(tmp_path / "nosuch")]) == 2
    assert "does not exist" in capsys.readouterr().err
