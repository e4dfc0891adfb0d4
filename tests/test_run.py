"""Where a run is written, what --overwrite deletes, and how a run is resumed: nothing of the user's is lost or mixed up."""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from pathlib import Path

import pytest
import torch

import dino
from dino import cli, weights
from dino.data.specs import get_name
from dino.engine.log import read_quarantine
from dino.weights.checkpoints import get_step
from dino.weights.runs import list_on_the_way
from helpers import TINY, assert_same_bits, draw_images, final_state, tiny_flags

SHORT = TINY | {"epochs": 1}


def read_all(folder: Path) -> dict[Path, bytes]:
    """Every file below `folder`; of a link what it leads to."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(photos, tmp_path) -> Path:
    """A run of one epoch in runs/a."""
    return dino.train(data=str(photos), out=str(tmp_path / "runs" / "a"), **SHORT)


def test_teachers_are_kept_evenly_over_the_run_and_go_with_it(photos, tmp_path):
    options = SHORT | {"data": str(photos), "log.keep_teachers": 3}
    whole = dino.train(out=str(tmp_path / "whole"), **options)
    kept, total = list_on_the_way(whole), final_state(whole)["step"]
    assert [get_step(path) for path in kept] == [0, total // 2, total]
    states = [dino.load(path).state_dict() for path in kept]
    last = dino.load(f"{whole}:last").state_dict()
    assert all(torch.equal(value, last[name]) for name, value in states[-1].items())
    assert not all(torch.equal(value, last[name]) for name, value in states[1].items())

    part = dino.train(out=str(tmp_path / "part"), **options | {"stop_after": 1})
    assert [get_step(path) for path in list_on_the_way(part)] == [0]
    dino.train(resume=str(part))
    assert [path.read_bytes() for path in list_on_the_way(part)] == [path.read_bytes() for path in kept]
    dino.train(out=str(part), overwrite=True, **options | {"log.keep_teachers": 0})
    assert not (part / "teachers").exists()


# --- overwriting ---------------------------------------------------------------------------------------------------


def test_overwrite_deletes_what_a_run_writes_and_nothing_else(run, photos, tmp_path):
    assert cli.main(["eval", "knn", str(run), "--data", str(photos), "--k", "3"]) == 0
    mine = draw_images(
        run / "pics"
    )  # as a data set of its own, a note, a list, labels, and a backup beside checkpoints
    for name in (
        "notes.txt",
        "labels.csv",
        "eval/my figures.json",
        "checkpoints/step-00000005.pt.bak",
        ".hidden",
        "x.png",
    ):
        (run / name).write_text("mine")
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{path}\n" for path in sorted(mine.rglob("*.jpg"))))
    kept = {p: b for p, b in read_all(run).items() if b == b"mine" or p.suffix == ".jpg"}
    old = set(read_all(run)) - set(kept)
    dino.train(data=str(listed), out=str(run), overwrite=True, **SHORT | {"stop_after": 2})
    now = read_all(run)
    assert {path: now.get(path) for path in kept} == kept
    assert not {path for path in set(now) & old if path.name in ("knn.json", "step-00000005.pt")}
    assert json.loads((run / "files.jsonl").read_text().split("\n")[0])["root"] == str(listed)


def refuse(capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    assert cli.main(["train", *map(str, flags)]) == 2
    said = capsys.readouterr().err
    assert said.count("dino: ") == 1
    return said


@pytest.mark.parametrize("given", ["run", "teacher", "checkpoint"])
def test_overwrite_refuses_to_delete_the_weights_it_is_to_start_from(run, photos, capsys, given):
    init = {"run": run, "teacher": run / "teacher.safetensors", "checkpoint": run / "checkpoints/step-00000005.pt"}[
        given
    ]
    before = read_all(run)
    said = refuse(capsys, "--data", photos, "--out", run, "--init", init, *tiny_flags(), "--overwrite")
    assert "is part of the run that --overwrite would delete" in said
    assert read_all(run) == before


def test_overwrite_deletes_nothing_behind_links(run, photos, tmp_path, capsys):
    other = dino.train(data=str(photos), out=str(tmp_path / "runs" / "b"), **SHORT)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").symlink_to(other / "checkpoints")
    before = read_all(tmp_path)
    assert "is a link" in refuse(capsys, "--data", photos, "--out", run, *tiny_flags(), "--overwrite")
    assert read_all(tmp_path) == before


@pytest.mark.parametrize("config", [None, 'baseURL = "https://example.org/"\n[params]\nauthor = "me"\n', "= no toml"])
def test_overwrite_spares_a_folder_that_holds_no_run(photos, capsys, config):
    """Photos given as --out by mistake must survive, also where another program has a config.toml."""
    if config is not None:
        (photos / "config.toml").write_text(config)
    before = read_all(photos)
    refuse(capsys, "--data", photos, "--out", photos, "--overwrite", *tiny_flags(stop_after=1))
    assert {path: text for path, text in read_all(photos).items() if path.name != ".lock"} == before


REFUSED = [
    ["--batch-size", "5000"],
    ["--data.decode", "device"],
    ["--views.local-size", "4"],
    ["--log.evaluate", "knn --data /nowhere"],
    ["--init", "/nowhere"],
]


@pytest.mark.parametrize("flags", REFUSED, ids=lambda flags: flags[0])
def test_a_refused_command_leaves_the_run_that_is_there_as_it_was(run, tmp_path, capsys, flags):
    other, before = draw_images(tmp_path / "other", seed=1), read_all(run)
    refuse(capsys, "--data", other, "--out", run, "--overwrite", *tiny_flags(stop_after=1), *flags)
    assert read_all(run) == before


# --- resuming ------------------------------------------------------------------------------------------------------


def test_stop_after_is_a_limit_of_one_call(photos, tmp_path, capsys):
    whole = dino.train(data=str(photos), out=str(tmp_path / "whole"), **TINY)
    run = dino.train(data=str(photos), out=str(tmp_path / "part"), **TINY | {"stop_after": 6})
    said = capsys.readouterr().err
    assert f"Next: dino train --resume {run}" in said
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert_same_bits(final_state(whole), final_state(run))
    (run / "config.toml").write_text(
        "stop_after = 6\n" + (run / "config.toml").read_text()
    )  # as versions before wrote it
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert "Stopped" not in capsys.readouterr().err


@pytest.mark.parametrize("length", [["--epochs", "2"], ["--minutes", "1"]])
def test_a_dry_run_prints_what_train_takes_and_writes_nothing(photos, tmp_path, capsys, monkeypatch, length):
    monkeypatch.chdir(tmp_path)
    flags = ["--data", str(photos), *tiny_flags(epochs=None, optim__warmup_epochs=None), *length, "--out", "run"]
    before = set(tmp_path.rglob("*"))
    assert cli.main(["train", *flags, "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert set(tmp_path.rglob("*")) == before
    options = tomllib.loads(printed)
    assert options["optim"]["lr"] > 0, "what was open is chosen"
    assert ("epochs" in options, "warmup_epochs" in options["optim"]) == (2 * (length[0] == "--epochs",))
    Path("mine.toml").write_text(printed)
    assert cli.main(["train", "mine.toml", "--out", "run", "--dry-run"]) == 0
    assert capsys.readouterr().out == printed
    if length[0] == "--epochs":
        assert cli.main(["train", "mine.toml", "--out", "run"]) == 0
        assert cli.main(["train", "--dry-run", "--resume", "run"]) == 0
        assert tomllib.loads(capsys.readouterr().out) == options | {"resume": "run"}
        assert cli.main(["train", "mine.toml", "--out", "run", "--dry-run"]) == 2
        assert "already holds a run" in capsys.readouterr().err


def test_resume_with_other_mathematics_is_refused_in_every_way(photos, tmp_path, capsys):
    run = dino.train(data=str(photos), out=str(tmp_path / "run"), **TINY | {"stop_after": 3})
    before = read_all(run)
    said = refuse(capsys, "--resume", run, "--optim.lr", "1")
    assert "optim.lr is 1.0 where it was 0.0005" in said
    assert f"--init {run}" in said
    for changes in ({"optim.lr": 1}, {"recipe": "cifar10"}, {"epochs": 4}):
        with pytest.raises(ValueError, match="--resume continues a run with"):
            dino.train(resume=str(run), **changes)
    file = tmp_path / "more.toml"
    file.write_text(f'resume = "{run}"\n[optim]\nlr = 1\n')
    assert "optim.lr is 1.0 where it was 0.0005" in refuse(capsys, file)
    assert read_all(run) == before
    file.write_text(f'resume = "{run}"\n[data]\nnum_workers = 0\n')
    assert cli.main(["train", str(file)]) == 0
    assert final_state(run)["step"] == 15


@pytest.mark.parametrize(("was", "now"), [("batch_size = 4", "batch_size = 8"), ("epochs = 3", "epochs = 5")])
def test_a_config_that_was_edited_is_refused(photos, tmp_path, capsys, was, now):
    run = dino.train(data=str(photos), out=str(tmp_path / "run"), **TINY | {"stop_after": 3})
    text = (run / "config.toml").read_text()
    assert was in text
    (run / "config.toml").write_text(text.replace(was, now))
    assert f"where it was {was.split()[-1]}" in refuse(capsys, "--resume", run)


def test_a_run_resumes_from_another_folder(photos, tmp_path, monkeypatch, capsys):
    draw_images(tmp_path / "val", 6)
    monkeypatch.chdir(tmp_path)
    flags = ["--data", "photos", "--data.val", "val", "--out", "run", *tiny_flags(stop_after=2)]
    assert cli.main(["train", *flags]) == 0
    monkeypatch.chdir("/")
    code = cli.main(["train", "--resume", str(tmp_path / "run"), "--stop-after", "4"])
    assert code == 0, capsys.readouterr().err


def test_images_that_were_moved_are_the_same_data(photos, tmp_path, monkeypatch, capsys):
    whole = dino.train(data=str(photos), out=str(tmp_path / "whole"), **TINY)
    run = dino.train(data=str(photos), out=str(tmp_path / "run"), **TINY | {"stop_after": 6})
    moved = photos.rename(tmp_path / "elsewhere")
    said = refuse(capsys, "--resume", run)
    assert f"its images {photos} are not there; if they were moved, say where they are with --data" in said
    other = draw_images(tmp_path / "other", count=12)
    for wrong in (other, moved / "class0"):
        assert "the images it was started with" in refuse(capsys, "--resume", run, "--data", wrong)
    draw_images(moved / "class0" / "new")  # images that have come since are not part of the run
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--resume", "run", "--data", "elsewhere", "--stop-after", "9"]) == 0
    monkeypatch.chdir("/")
    assert cli.main(["train", "--resume", str(run)]) == 0  # it knows the new place from then on
    assert_same_bits(final_state(whole), final_state(run))
    assert tomllib.loads((run / "config.toml").read_text())["data"]["path"] == str(moved)


def test_other_images_of_the_same_names_are_not_taken_when_labels_differ(photos, tmp_path, capsys):
    run = dino.train(data=str(photos), out=str(tmp_path / "run"), **TINY | {"stop_after": 3})
    (run / "files.jsonl").unlink()
    next(photos.rglob("*.jpg")).unlink()
    assert "not the ones this run was started with" in refuse(capsys, "--resume", run)


def test_repaired_images_are_forgiven(photos, tmp_path, capsys):
    good = read_all(photos)
    for path in sorted(photos.rglob("*.jpg"))[:9]:
        path.write_bytes(b"")
    run = tmp_path / "run"
    flags = ["--data", str(photos), "--out", str(run), *tiny_flags()]
    assert cli.main(["train", *flags]) == 1
    named = {line["image"] for line in read_quarantine(run / "quarantine.jsonl")}
    assert len(named) > 5
    assert cli.main(["train", "--resume", str(run)]) == 1
    for path, content in good.items():
        path.write_bytes(content)
    capsys.readouterr()
    assert cli.main(["train", "--resume", str(run), "--stop-after", "2"]) == 0, capsys.readouterr().err
    assert read_quarantine(run / "quarantine.jsonl") == []
    for path in sorted(photos.rglob("*.jpg"))[:9]:  # a new run names all of them anew
        path.write_bytes(b"")
    assert cli.main(["train", *flags, "--overwrite", "--data.max-bad-fraction", "1"]) == 0
    assert {line["image"] for line in read_quarantine(run / "quarantine.jsonl")} >= named


def test_one_broken_photo_among_few_does_not_end_a_run(tmp_path):
    photos = draw_images(tmp_path / "photos", count=37)
    (photos / "class0" / "000.jpg").write_bytes(b"")
    run = dino.train(data=str(photos), out=str(tmp_path / "run"), **SHORT)
    assert final_state(run)["step"] == 33 // 4
    with pytest.raises(Exception, match="max-bad-fraction 0 allows"):
        dino.train(data=str(photos), out=str(tmp_path / "strict"), **SHORT | {"data.max_bad_fraction": 0, "seed": 1})


# --- numbers that are not finite -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"stop_after": 2},
        {"log.every": 1, "log.checkpoint_minutes": 1e-6},
        {"log.knn_every": 0.2},
        {"log.knn_every": 0.2, "optim.lr": 1e15},  # features overflow before weights do
    ],
)
def test_a_run_that_diverges_stops_and_leaves_no_bad_checkpoint(photos, tmp_path, capsys, changes):
    explode = TINY | {"epochs": 20, "optim.lr": 1e8, "optim.warmup_epochs": 0, "log.every": 2} | changes
    with pytest.raises(Exception, match=r"became|gradient|weights") as error:
        dino.train(data=str(photos), out=str(tmp_path / "run"), **explode)
    assert type(error.value).__name__ == "TrainingError"
    assert "not a number" in str(error.value) or "nan" in str(error.value) or "inf" in str(error.value)
    kept = sorted((tmp_path / "run" / "checkpoints").glob("step-*.pt"))
    if kept:
        assert str(kept[-1]) in str(error.value)
        weights.load(tmp_path / "run")
        assert all(value.isfinite().all() for value in final_state(tmp_path / "run").values())
    else:
        assert "there is no checkpoint yet" in str(error.value)


# --- names ---------------------------------------------------------------------------------------------------------


def test_the_run_directory_is_named_after_the_data(tmp_path, monkeypatch):
    folder = tmp_path / "data.2024"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "list.v2.txt").write_text("")
    monkeypatch.chdir(folder)
    names = {".": "data.2024", "..": tmp_path.name, "sub/": "sub", "../list.v2.txt": "list.v2", "scenes:50": "scenes"}
    assert {spec: get_name(spec) for spec in names} == names
    assert get_name("torchvision:CIFAR10:x") == "CIFAR10"
    assert get_name("/") == "run"


def test_a_tilde_and_a_path_are_taken_everywhere(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert dino.train(data=photos, out=Path("~/py"), **SHORT) == tmp_path / "py"
    assert cli.main(["train", "--data=~/photos", "--out=~/flag", *tiny_flags(epochs=1)]) == 0
    (tmp_path / "x.toml").write_text('out = "~/toml"\n')
    assert cli.main(["train", "x.toml", "--data", "~/photos", *tiny_flags(epochs=1)]) == 0
    for name in ("py", "flag", "toml"):
        assert cli.main(["train", "--resume", f"~/{name}"]) == 0
    assert cli.main(["train", "--init", "~/py", "--data", "~/photos", "--out", "~/again", *tiny_flags(epochs=1)]) == 0
    assert cli.main(["eval", "knn", "~/py", "--data", "~/photos", "--k", "3"]) == 0
    assert (tmp_path / "py" / "eval" / "knn.json").exists()
    assert cli.main(["report", "~/py"]) == 0
    assert cli.main(["export", "~/py", "--to", "safetensors", "--out", "~/x.safetensors"]) == 0
    assert {"x.safetensors", "again"} <= {*os.listdir(tmp_path)}
    assert not [name for name in os.listdir(tmp_path) if "~" in name]
