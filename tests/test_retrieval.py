"""Landmark retrieval: the reference's figures, the benchmark's rules, and what the command says of bad ground truth."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import dino
from dino.cli import main
from dino.data.image_files import open_source
from dino.eval import ranking, retrieval
from dino.options.evaluate import RetrievalOptions
from drawing import lay_out_landmarks
from helpers import GOLDEN, draw_images, ranks_agree

CPU = torch.device("cpu")


def test_figures_are_the_references(golden):
    features = {k: F.normalize(torch.from_numpy(v), dim=1) for k, v in golden("retrieval_features").items()}
    known = json.loads((GOLDEN / "retrieval.json").read_text())
    ranked = (features["queries"] @ features["database"].T).argsort(dim=1, descending=True, stable=True).numpy()
    found = retrieval.score_rankings(
        ranked, *([entry[key] for entry in known["gnd"]] for key in ("easy", "hard", "junk"))
    )
    assert len(found) == 12
    for letter, name in (("E", "easy"), ("M", "medium"), ("H", "hard")):
        expected = known["results"][letter]
        assert found[f"{name}_map"] == pytest.approx(100 * expected["map"], abs=1e-5)
        for k, value in zip((1, 5, 10), expected["mp_at_1_5_10"], strict=True):
            assert found[f"{name}_mp{k}"] == pytest.approx(100 * value, abs=1e-5)


def test_queries_with_nothing_to_find_are_left_out():
    order = np.array([[0, 1, 2], [2, 1, 0]])
    found = retrieval.score_rankings(order, easy=[[0], []], hard=[[], []], junk=[[], []])
    assert found == {f"{p}_{f}": 100.0 for p in ("easy", "medium") for f in ("map", "mp1", "mp5", "mp10")}
    assert (
        retrieval.score_rankings(order, [[1], [0]], [[], []], [[0], [1, 2]])["easy_map"] == 100
    )  # junk counts neither way


def test_original_whitening_is_the_references_and_fixed_decorrelates(golden):
    g = {k: torch.from_numpy(v) for k, v in golden("whitening").items()}
    learned = ranking.learn_whitening(g["features"], centered=False)
    found = g["features"] @ learned.projection.float()  # the file's are projected without taking off the mean
    off = (found * (found * g["whitened"]).sum(dim=0).sign() - g["whitened"]).abs().amax(dim=0)
    assert off[:13].max() < 1e-5
    # The last three variances are 50 to 30,000 times below the first: there the file shows its float32 covariance.
    assert (off[13:] < torch.tensor([3e-5, 3e-5, 1e-3])).all()
    expected = (g["features"] - g["features"].mean(dim=0)) @ learned.projection.float()
    torch.testing.assert_close(learned(g["features"]), expected, rtol=1e-4, atol=1e-4)
    unit = torch.eye(found.shape[1])
    away = g["features"] + 5  # off the center, the reference's covariance is mostly the mean's
    original, fixed = (ranking.learn_whitening(away, centered)(away) for centered in (False, True))
    torch.testing.assert_close(fixed.T @ fixed / len(fixed), unit, rtol=0, atol=1e-4)
    assert (original.T @ original / len(original) - unit).abs().max() > 0.5


def test_command_line(saved_model, tmp_path):
    data = lay_out_landmarks(tmp_path / "data")
    draw_images(tmp_path / "others", 30, seed=1)
    plain = ranks_agree("eval", "retrieval", saved_model, "--data", data)
    assert len(plain["figures"]) == 12
    assert 0 < plain["figures"]["tiny_medium_map"] < 100
    assert plain["images"] == {"images in the database": 21, "queries": 3}
    assert plain["data"].keys() == {"database", "queries"}
    assert "fixed protocol: cosine of [CLS] features at 1, 1/sqrt(2) and 1/2 of 32 pixels" in plain["protocol"]
    more = ["--protocol", "original", "--whiten", tmp_path / "others", "--scales", 1, "--size", 40]
    more += ["--json", tmp_path / "other.json"]
    assert main([*map(str, ["eval", "retrieval", saved_model, "--data", data / "gnd_tiny.pkl", *more])]) == 0
    other = json.loads((tmp_path / "other.json").read_text())
    assert other["data"].keys() == {"database", "queries", "whitening"}
    assert other["protocol"].endswith(
        "features at 40 pixels (longer side), queries whole, whitened by a PCA of 30 other images"
    )
    assert other["figures"] != plain["figures"]


def test_fixed_asks_for_the_box_and_original_for_the_whole_image(saved_model, tmp_path):
    """Queries are scenes with an image of the database in one corner; only who looks at the box knows it again."""
    rng = np.random.default_rng(0)
    (tmp_path / "jpg").mkdir()
    things = np.kron(rng.integers(0, 255, (8, 8, 8, 3)), np.ones((1, 4, 4, 1))).astype(np.uint8)
    gnd = []
    for i, thing in enumerate(things):
        scene = np.kron(rng.integers(0, 255, (2, 2, 3)), np.ones((32, 32, 1))).astype(np.uint8)
        scene[32:, 16:48] = thing
        for name, pixels in ((f"thing{i}", thing), (f"scene{i}", scene)):
            Image.fromarray(pixels).save(tmp_path / "jpg" / f"{name}.jpg", "PNG")
        gnd.append({"bbx": np.array([16.2, 32, 48, 64.4]), "easy": np.array([i]), "hard": [], "junk": []})
    names = {f"{key}list": [f"{name}{i}" for i in range(8)] for key, name in (("im", "thing"), ("qim", "scene"))}
    (tmp_path / "gnd_scenes.pkl").write_bytes(pickle.dumps(names | {"gnd": gnd}))

    def found(protocol):
        options = RetrievalOptions(model=str(saved_model), data=str(tmp_path), size=64, protocol=protocol)
        return retrieval.evaluate(dino.load(saved_model), options, CPU).figures

    assert found("fixed")["scenes_easy_map"] == 100
    assert found("original")["scenes_easy_map"] < 60


def test_boxes_are_cut_before_shrinking_and_by_the_whole_images_scale(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (100, 200, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    whole = open_source(str(tmp_path), "none")
    cut = retrieval.Cropped(whole, [(-3, 20, 60, 80)], 400)
    assert np.array_equal(cut.read(0), pixels[20:80, :60])
    assert retrieval.Cropped(whole, [(0, 20, 60, 80)], 100).read(0).shape == (30, 30, 3)
    assert len({whole.fingerprint, cut.fingerprint, retrieval.Cropped(whole, [(0, 0, 9, 9)], 400).fingerprint}) == 3


def test_ground_truth_as_json_is_that_of_the_pickle(saved_model, tmp_path):
    data = lay_out_landmarks(tmp_path / "data")
    expected = dino.evaluate("retrieval", saved_model, data=str(data))
    pickled = data / "gnd_tiny.pkl"
    (data / "gnd_tiny.json").write_text(json.dumps(pickle.loads(pickled.read_bytes())))
    pickled.unlink()
    assert dino.evaluate("retrieval", saved_model, data=str(data)) == expected
    (data / "gnd_tiny.json").write_text('{"imlist": [')
    with pytest.raises(ValueError, match=r"gnd_tiny\.json is no ground truth"):
        dino.evaluate("retrieval", saved_model, data=str(data / "gnd_tiny.json"))


def test_rankings_of_classes_by_hand():
    """Points of a circle by their angles, so that neighbors are those next to each other."""

    def place(angles: list[int], labels: list[int]) -> retrieval.Labeled:
        radians = torch.tensor(angles, dtype=torch.float32).deg2rad()
        return retrieval.Labeled(torch.stack([radians.cos(), radians.sin()], dim=1), np.array(labels))

    bank = place([0, 10, 21, 33, 90], [0, 0, 1, 0, 1])
    queries = place([9, 91, 40], [0, 1, 2])  # nobody is of class 2
    # Query 0 ranks them as 1, 0, 2, 3, 4 and finds ranks 0, 1 and 3; query 1 ranks them as 4, 3, 2, 1, 0 and finds 0 and 2.
    found = retrieval.score_classes(bank, queries, None)
    maps = [(1 + 1 + (2 / 3 + 3 / 4) / 2) / 3, (1 + (1 / 2 + 2 / 3) / 2) / 2]
    assert found["map"] == pytest.approx(100 * np.mean(maps))
    assert (found["mp1"], found["mp5"]) == (100, pytest.approx(100 * np.mean([3 / 4, 2 / 3])))
    # Each is a query for the others: itself neither counts as found nor takes a rank.
    alone = retrieval.score_classes(bank, bank, np.arange(5))
    assert alone["mp1"] == pytest.approx(100 * np.mean([1, 1, 0, 0, 0]))
    assert retrieval.score_classes(bank, place([0], [2]), None) == {}


def test_class_folders_without_options(saved_model, tmp_path, capsys):
    """Each image is a query; with test images they are. What cannot be read is left out; ranks agree."""
    folder = draw_images(tmp_path / "photos", 30)
    whole = ranks_agree("eval", "retrieval", saved_model, "--data", folder)
    assert whole["images"] == {"images in the database": 30, "queries": 30}
    assert whole["figures"].keys() == {f"retrieval_{name}" for name in ("map", "mp1", "mp5", "mp10")}
    floors = whole["floors"]["retrieval_mp5"]
    assert floors["chance"] == pytest.approx(100 * 9 / 29)
    assert floors.keys() == {"chance", "raw 32x32 pixels", "color histograms"}
    assert whole["floors"]["retrieval_map"]["raw 32x32 pixels"] > 60  # the classes are colors of a square
    draw_images(tmp_path / "split/train", 30)
    draw_images(tmp_path / "split/test", 9, seed=1)
    (tmp_path / "split/test/class0/000.jpg").write_bytes(b"no image")
    assert main(["eval", "retrieval", str(saved_model), "--data", str(tmp_path / "split"), "--scales", "1"]) == 0
    said = capsys.readouterr().out
    assert "1 queries images could not be read" in said
    assert "30 images in the database, 8 queries" in said
    assert "mAP to beat, on 8 queries and 30 of the database: chance 33.3 %" in said
    for path in folder.rglob("*.jpg"):
        if path.name != "000.jpg" and path.name != "001.jpg":
            path.unlink()
    with pytest.raises(ValueError, match=r"no query of .* has another image of its class"):
        dino.evaluate("retrieval", saved_model, data=str(folder))


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


GOOD = {"bbx": (0, 0, 9, 9), "easy": [1], "hard": [], "junk": []}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"imlist": ["absent"] * 21}, "names are missing, first .*absent.jpg; expected are DATA/gnd_roxford5k.pkl"),
        ({"qimlist": [Trap()]}, "asks for posix.mkdir, which could run code"),
        ({"gnd": [GOOD]}, "3 queries but 1 entries in gnd"),
        ({"gnd": [GOOD | {"easy": [99]}] * 3}, "a position lies outside its 21 images"),
        ({"gnd": [GOOD | {"bbx": (9, 0, 0, 9)}] * 3}, "a bbx is not left, top, right, bottom"),
        (
            {"gnd": [GOOD | {"bbx": (500, 0, 600, 9)}] * 3},
            r"3 of the 3 images \(queries\) cannot be read.*lies outside",
        ),
        ({"gnd": [GOOD | {"easy": []}] * 3}, "no query of .* has an easy or a hard image"),
        ({"imlist": [], "gnd": [GOOD | {"easy": []}] * 3}, "names no image"),
        ({"gnd": 3}, "is no ground truth of the revisited benchmarks"),
    ],
)
def test_bad_ground_truth_is_refused(saved_model, tmp_path, monkeypatch, capsys, changes, words):
    monkeypatch.chdir(tmp_path)
    data = lay_out_landmarks(tmp_path / "data", changes)
    assert main(["eval", "retrieval", str(saved_model), "--data", str(data)]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert re.search(words, said), said
    assert not Path("trapped").exists()


def test_other_bad_input_is_refused(saved_model, tmp_path, capsys):
    def said(*arguments) -> str:
        assert main(["eval", "retrieval", str(saved_model), "--data", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "It holds no ground truth either: expected are DATA/gnd_roxford5k.pkl" in said(tmp_path)
    assert "gnd_absent.pkl does not exist; expected are" in said(tmp_path / "gnd_absent.pkl")
    data = lay_out_landmarks(tmp_path / "data")
    (tmp_path / "empty").mkdir()
    assert "holds no files" in said(data, "--whiten", tmp_path / "empty")
    Image.new("RGB", (40, 40)).save(tmp_path / "empty" / "one.png")
    assert "holds one image" in said(data, "--whiten", tmp_path / "empty")
    (data / "jpg" / "class0-003.jpg").write_bytes(b"no image")
    assert "1 of the 21 images (database) cannot be read, first class0-003.jpg" in said(data)
    (data / "gnd_tiny.pkl").write_bytes(b"no pickle")
    assert "is no ground truth" in said(data)
    (data / "gnd_other.pkl").write_bytes(b"")
    assert "several ground truths: give one of them" in said(data)
