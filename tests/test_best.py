"""The best teacher: chosen by scores, kept through kills and damage, and taken by the name of its run."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dino
from dino import cli, weights
from dino.engine.best import BestTeacher
from dino.engine.log import read_metrics
from dino.eval.online import OnlineEvaluation
from dino.weights import runs
from dino.weights.checkpoints import read_newest
from helpers import TINY, assert_same_bits, draw_images, final_state

State = dict[str, torch.Tensor]


def drive(*measured: tuple[int, dict[str, float]]) -> BestTeacher:
    """What is kept of measurements; the weights at a step are that number."""
    best, network = BestTeacher(), torch.nn.Linear(1, 1)
    for step, values in measured:
        torch.nn.init.constant_(network.weight, step)
        best.consider(step, values, network)
    return best


def test_the_best_is_the_highest_score_and_of_equal_ones_the_latest():
    best = drive(*((5 * i, {"knn20_top1": score}) for i, score in enumerate([50.0, 30.0, 40.0, 40.0, 20.0])))
    assert best.found == runs.Best(15, "knn20_top1", 40.0, 50.0)
    assert best.weights["weight"].item() == 15
    assert best.found.describe(20) == (
        "the teacher of step 15 of 20, the best by 20-NN on held-out images (40.0 %), but no better than before training "
        "(50.0 %)"
    )
    assert "the last and the best" in best.found.describe(15)


def test_what_is_no_number_or_another_score_is_never_the_best():
    best = drive(
        (0, {"knn10_top1": 10.0, "two_crop_retrieval": 99.0}),
        (1, {"knn10_top1": math.nan}),
        (2, {}),
        (3, {"knn10_top1": 20.0}),
        (4, {"knn10_top1": math.nan, "knn20_top1": 90.0}),
        (5, {"knn10_top1": math.inf}),
        (6, {"two_crop_retrieval": 99.0}),
    )
    assert best.found == runs.Best(3, "knn10_top1", 20.0, 10.0)
    assert drive((0, {"knn20_top1": 9.0}), (1, {"knn20_top1": math.nan})).found is None


def test_the_order_of_scores_is_20_nn_10_nn_and_without_labels_crops():
    every = {"effective_rank": 9.0, "two_crop_retrieval": 1.0, "knn10_top1": 2.0, "knn20_top1": 3.0}
    for name in ("knn20_top1", "knn10_top1", "two_crop_retrieval"):
        found = drive((0, every), (1, every)).found
        assert found is not None
        assert found.measure == name
        del every[name]
    assert drive((0, every), (1, every)).found is None


# --- a run whose second of three checks is the best -----------------------------------------------------------------


@pytest.fixture
def scored(monkeypatch) -> Callable[[dict[int, float]], None]:
    """Lets a run's checks find these 20-NN accuracies, by step."""

    def install(scores: dict[int, float]) -> None:
        check = OnlineEvaluation.__call__
        patched = lambda self, method, step: check(self, method, step) | {"knn20_top1": scores[step]}  # noqa: E731
        monkeypatch.setattr(OnlineEvaluation, "__call__", patched)

    return install


SCORES = {0: 10.0, 5: 20.0, 10: 40.0, 15: 30.0}


@pytest.fixture
def run(photos, tmp_path, scored) -> Path:
    scored(SCORES)
    return dino.train(data=str(photos), out=str(tmp_path / "runs" / "a"), **TINY)


def teachers(run: Path) -> tuple[State, State]:
    """The best and the last, as the newest checkpoint has them."""
    found = read_newest(run / "checkpoints")
    assert found is not None
    assert found.state["best"]["found"] == {"step": 10, "measure": "knn20_top1", "score": 40.0, "before": 10.0}
    last = {k.removeprefix("teacher.backbone."): v for k, v in found.state["method"].items() if "teacher.backbone" in k}
    return found.state["best"]["weights"], last


def test_the_best_is_what_a_name_takes_and_the_last_can_be_asked_for(run, photos, tmp_path, capsys, monkeypatch):
    best, last = teachers(run)
    assert not torch.equal(best["cls_token"], last["cls_token"])
    assert_same_bits(dino.load(run).state_dict(), best)
    assert_same_bits(dino.load(Path(f"{run}:last")).state_dict(), last)
    assert (read := weights.read(run, only_backbone=True)).step == 10
    assert read.best == runs.Best(10, "knn20_top1", 40.0, 10.0)
    assert weights.read(f"{run}:last", only_backbone=True).best is None
    capsys.readouterr()

    for file, state in ((run / "best.safetensors", best), (run / "teacher.safetensors", last)):
        assert_same_bits(dino.load(file).state_dict(), state)
    (run.parent / "b/teachers").mkdir(parents=True)
    for name in ("config.json", "teacher.safetensors"):
        shutil.copy(run / name, run.parent / "b")
    kept = shutil.copy(run / "best.safetensors", run.parent / "b/teachers/step-00000010.safetensors")
    assert_same_bits(dino.load(kept).state_dict(), best)
    shutil.rmtree(run.parent / "b")

    everything = weights.read(run)  # student and heads are kept of the last only
    assert_same_bits(everything.backbone(), last)
    assert "has only the backbone of its best teacher (step 10); taking all of step 15" in capsys.readouterr().err

    monkeypatch.chdir(run.parent)
    for name, written, state in (("a", "eval/knn.json", best), ("a:last", "eval/last/knn.json", last)):
        assert cli.main(["eval", "knn", name, "--data", str(photos), "--k", "3"]) == 0
        result = json.loads((run / written).read_text())["model"]
        assert result == {"name": name, "sha256": runs.hash_state(state)}
    folder = dino.embed("a:last", str(photos), tmp_path / "x.parquet")
    assert folder.about["model"] == f"{run}:last"
    monkeypatch.chdir(tmp_path)
    assert dino.search(tmp_path / "x.parquet", [next(photos.rglob("*.jpg"))], k=1).cosine.item() == pytest.approx(1)
    dino.export(f"{run}:last", "safetensors", tmp_path / "last.safetensors")
    dino.export(run, "safetensors", tmp_path / "best.safetensors")
    cards = [(tmp_path / f"{name}.safetensors.md").read_text() for name in ("best", "last")]
    assert [("| steps | 10 |" in card, "the best by 20-NN" in card) for card in cards] == [(True, True), (False, False)]


def test_what_is_taken_is_said(photos, tmp_path, scored, capsys):
    scored(SCORES)
    run = dino.train(data=str(photos), out=str(tmp_path / "run"), **TINY | {"report": True})
    said = "the teacher of step 10 of 15, the best by 20-NN on held-out images (40.0 %)"
    assert f'dino.load("{run}") takes {said}; "{run}:last" is the last.' in capsys.readouterr().err
    assert f"<code>dino.load</code> takes {said}. " in (run / "report.html").read_text()


def test_files_that_are_missing_damaged_or_old_are_never_used(run, capsys):
    best, last = teachers(run)
    file, other = run / "best.safetensors", run / "teacher.safetensors"
    right = {path: path.read_bytes() for path in (file, other)}

    def flip() -> None:
        content = bytearray(right[file])
        content[-5] ^= 1
        file.write_bytes(content)

    for harm in (
        file.unlink,
        flip,
        lambda: file.write_bytes(b""),
        lambda: runs.save_best(run, last, runs.Best(5, "knn20_top1", 20.0, 10.0)),  # of the save before
        other.unlink,
        lambda: weights.save(run, dino.load(f"{run}:last"), {}, step=5),  # config.json and teacher, as of a save before
    ):
        harm()
        capsys.readouterr()
        assert_same_bits(dino.load(run).state_dict(), best)
        assert "taking step-00000015.pt" in capsys.readouterr().err
        assert_same_bits(dino.load(f"{run}:last").state_dict(), last)
        capsys.readouterr()
        dino.train(resume=run)
        assert "is complete: nothing is left to train." in "".join(capsys.readouterr())
        assert {path: path.read_bytes() for path in right} == right


def test_a_resume_ends_with_the_same_best(run, photos, tmp_path):
    for at in (5, 12):
        part = dino.train(data=str(photos), out=str(tmp_path / f"part{at}"), stop_after=at, **TINY)
        dino.train(resume=part)
        assert_same_bits(final_state(run), final_state(part))
        for name in ("best.safetensors", "teacher.safetensors", "config.json"):
            assert (part / name).read_bytes() == (run / name).read_bytes(), (at, name)


def test_runs_of_before_load_as_before_and_choose_a_best_from_then_on(run, capsys):
    _, last = teachers(run)
    (run / "best.safetensors").unlink()
    for path in run.glob("checkpoints/step-*.pt"):
        state = torch.load(path, weights_only=True)
        torch.save({name: value for name, value in state.items() if name not in ("best", "prototypes")}, path)
    weights.save(run, dino.load(f"{run}:last"), json.loads((run / "config.json").read_text())["model"], 15)
    capsys.readouterr()
    for name in (run, f"{run}:last"):
        assert_same_bits(dino.load(name).state_dict(), last)
    assert capsys.readouterr().err == ""
    (run / "checkpoints" / "step-00000015.pt").unlink()
    dino.train(resume=run)
    assert weights.read(run, only_backbone=True).best == runs.Best(15, "knn20_top1", 30.0, None)


def test_a_copy_without_checkpoints_has_both_and_the_last_alone_is_enough(run, tmp_path):
    best, last = teachers(run)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "teacher.safetensors"):
        (copy / name).write_bytes((run / name).read_bytes())
    assert_same_bits(dino.load(copy).state_dict(), last)
    (copy / "best.safetensors").write_bytes((run / "best.safetensors").read_bytes())
    assert_same_bits(dino.load(copy).state_dict(), best)
    assert_same_bits(dino.load(f"{copy}:last").state_dict(), last)


def test_without_labels_crops_choose_and_without_a_check_the_last_is_taken(tmp_path):
    flat = draw_images(tmp_path / "flat", classes=1)
    run = dino.train(data=str(flat), out=str(tmp_path / "run"), **TINY | {"data.labels": "none"})
    scores = {
        x["step"]: x["two_crop_retrieval"] for x in read_metrics(run / "metrics.jsonl") if "two_crop_retrieval" in x
    }
    found = weights.read(run, only_backbone=True).best
    assert found is not None
    assert (found.measure, found.score) == ("two_crop_retrieval", max(scores[step] for step in (5, 10, 15)))
    changes = {"data.labels": "none", "log.knn_every": 0, "stop_after": 5}
    run = dino.train(data=str(flat), out=str(tmp_path / "short"), **TINY | changes)
    assert weights.read(run, only_backbone=True).best is None
    assert not (run / "best.safetensors").exists()
    assert_same_bits(dino.load(run).state_dict(), dino.load(f"{run}:last").state_dict())


def test_checks_change_no_bit_of_the_training(photos, tmp_path):
    states = []
    for every in (0.2, 0):
        changes = {"log.knn_every": every, "model.drop_path": 0.2, "epochs": 2}
        run = dino.train(data=str(photos), out=str(tmp_path / f"every-{every}"), **TINY | changes)
        states.append(final_state(run))
    assert_same_bits(*states)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path, monkeypatch) -> Path:
    """Runs by these names in the working directory, and folders that are none."""
    for name in ("a", "vits16", "b:last", "C", "odd:name"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").touch()
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "path", "last"),
    [
        ("a", "a", False),
        ("a/", "a/", False),
        ("a:last", "a", True),
        ("./a:last", "./a", True),
        ("vits16:full", "vits16:full", False),  # a release, though there is a run of that name
        ("dino_vits8", "dino_vits8", False),
        ("vits16:last", "vits16", True),
        ("b:last", "b:last", False),  # its very name
        ("b:last:last", "b:last", True),
        ("odd:name", "odd:name", False),
        ("odd:name:last", "odd:name", True),
        ("D:\\runs\\a", "D:\\runs\\a", False),
        ("photos:last", "photos:last", False),
        ("nothing:last", "nothing:last", False),
        ("", "", False),
    ],
)
def test_which_teacher_a_name_asks_for(name, path, last, folders):
    assert runs.split_name(name) == (path, last)
    if path in ("a", "./a"):
        assert runs.split_name(f"{folders}/{name}") == (f"{folders}/{path}", last)
        assert runs.make_absolute(name) == f"{folders}/a" + ":last" * last
        assert runs.find_run(name) == Path(path)


@pytest.mark.parametrize("word", ["lst", "", "15"])
def test_another_word_after_the_colon_is_refused_kindly(word, folders, capsys):
    assert cli.main(["eval", "knn", f"a:{word}", "--data", "photos"]) == 2
    assert capsys.readouterr().err == (
        f"dino: a run has no '{word}' teacher; give a for the best, or a:last for the last.\n"
    )
    assert cli.main(["eval", "knn", "nothing:last", "--data", "photos"]) == 2
    assert "there is no run, weight file or release 'nothing:last'" in capsys.readouterr().err


def test_a_run_is_not_overwritten_by_one_that_starts_from_its_last(run, photos, capsys):
    flags = ["--data", str(photos), "--out", str(run), "--init", f"{run}:last", "--overwrite"]
    assert cli.main(["train", *flags]) == 2
    assert "is part of the run that --overwrite would delete" in capsys.readouterr().err
    assert os.path.exists(run / "best.safetensors")
